"""The project's own reading task: invented passages and questions in the SQuAD v1.1 format."""
