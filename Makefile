# Every target makes its own environment in .venv; the stamp is renewed when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Not --quiet: mkdocs counts the warnings that it prints, and --strict fails by their count.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One process a core; -m "not slow" leaves what test-all adds: whole products of cases, and more draws of a property.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 FLOWFACTOR_SMALL=1 $(BIN)/python -m pytest -q --numprocesses=$(WORKERS)
ALL := --nbmake --nbmake-timeout=300 tests flowfactor examples

.PHONY: demo test test-all test-plain test-lowest test-newest bench docs lint format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/flowfactor demo

# Cheap checks first; the one pytest call holds unit tests, doctests and notebooks.
test: lint
	$(MKDOCS)
	$(PYTEST) -m "not slow" $(ALL)

test-all: lint
	$(MKDOCS)
	FLOWFACTOR_TEST_CASES=many $(PYTEST) $(ALL)

# Jobs that vary one axis, each in an environment of its own: no extras, the lowest versions declared, the newest there are.
test-plain: BIN = .venv-plain/bin
test-plain: .venv-plain/.installed
	FLOWFACTOR_TEST_PLAIN=1 $(PYTEST) -m "not slow" tests flowfactor

test-lowest: BIN = .venv-lowest/bin
test-lowest: .venv-lowest/.installed
	$(PYTEST) -m "not slow" tests flowfactor

test-newest: BIN = .venv-newest/bin
test-newest: .venv-newest/.installed
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[all,test]'
	$(PYTEST) -m "not slow" tests flowfactor

.venv-plain/.installed: pyproject.toml constraints.txt
	test -x .venv-plain/bin/python || $(PYTHON) -m venv .venv-plain
	.venv-plain/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

.venv-lowest/.installed: pyproject.toml tests/lowest.py
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python tests/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet -c .venv-lowest/constraints.txt -e '.[all,test]'
	touch $@

.venv-newest/.installed: pyproject.toml
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet -e '.[all,test]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Its peer, diffrax, is not needed for anything else; where it cannot be had, its rows are left out with a notice.
bench: $(STAMP)
	$(BIN)/python -c "import diffrax" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]' || echo "diffrax could not be installed"
	$(BIN)/python -m benchmarks

# Unlike the check in `test`, this runs the notebooks, so that their pages show pictures.
docs: $(STAMP)
	FLOWFACTOR_RUN_NOTEBOOKS=true $(MKDOCS)

# What can be made again; what runs have trained and drawn is the user's, demo_output as well.
clean:
	rm -rf .venv .venv-plain .venv-lowest .venv-newest site dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,docs,dev]'
	touch $@
