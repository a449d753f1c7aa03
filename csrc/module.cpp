// The Python module sparse_attn._C. It is empty: loading the library is what registers the operators.
// That needs no Python, so a compiler without Python's headers builds a complete extension too.
#if __has_include(<Python.h>)
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      .m_base = PyModuleDef_HEAD_INIT,
      .m_name = "_C",
      .m_doc = "Operators of sparse_attn",
      .m_size = -1,
  };
  return PyModule_Create(&definition);
}
#endif
