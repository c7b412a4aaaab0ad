# Every target makes its own environment in .venv; the stamp is renewed when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Not --quiet: mkdocs counts the warnings that it prints, and --strict fails by their count.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: demo test bench docs lint format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/flowfactor demo

# Cheap checks first; the one pytest call holds unit tests, doctests and notebooks.
test: lint
	$(MKDOCS)
	OMP_NUM_THREADS=1 FLOWFACTOR_SMALL=1 $(BIN)/python -m pytest -q --nbmake --nbmake-timeout=300 tests flowfactor examples

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
	rm -rf .venv site dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,docs,dev]'
	touch $@
