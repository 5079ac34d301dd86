# The commands people type. `make demo` and `make test` need Python 3.11 to 3.13 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# where it is set, each of the processes that tests start would compile the package again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check bench clients clean

# pip would compile all of torch and transformers, which takes as long as the rest; what is imported is compiled then
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade "setuptools>=77" wheel
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)      ## compress the bundled model at 4 bits, end to end
	$(BIN)/compress demo -o demo-out

# mypy keeps one core busy; on another, all tests are imported, which leaves their compiled form to the workers of `test`
check: $(STAMP)     ## lint, types, layout
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest -m "not clients" -k test_layout.py; layout=$$?; wait $$types && exit $$layout

test: check         ## everything that runs without a GPU
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not clients"

PEER := .clients/llmcompressor
$(PEER)/.installed:  ## the peer of the demo's speed table, in an environment of its own
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PEER)/bin/python -m pip install --quiet llmcompressor==0.14.0.1
	touch $@

bench: $(STAMP) $(PEER)/.installed  ## the tables in reports/ that need no GPU
	$(BIN)/python reports/memory/bench.py --write
	$(BIN)/python reports/demo-speed/bench.py $(PEER)/bin/python --write

clients: $(STAMP)   ## one environment a client that cannot share ours, then the tests against it
	tests/clients/make.sh .clients
	$(BIN)/python -m pytest -m clients

clean:
	rm -rf $(VENV) .clients build *.egg-info
