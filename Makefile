# `make book` and `make test` do all their set-up themselves; `make help` lists the rest.
PY    := .venv/bin/python
ROOT  := $(if $(filter 0,$(shell id -u)),,sudo )
OUT   ?= .
PORT  ?= 8000
SERVE ?= 1
export UV_PYTHON_DOWNLOADS = never

.PHONY: help book test check lab freeze record bench address chromium
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1	\2/' | expand -t 16

.venv/ready: requirements.txt pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer, got $$(python3 -V)"; exit 1; }
	@[ -x $(PY) ] || python3 -m venv .venv || { rm -rf .venv; $(ROOT)apt-get update && $(ROOT)apt-get install -y python3-venv && python3 -m venv .venv; }
	@[ -x .venv/bin/uv ] || $(PY) -m pip install -q uv==0.13.8
	@sed '/^pydensecrf2/d' requirements.txt > .venv/requirements.txt
	.venv/bin/uv pip install -q -p $(PY) -r .venv/requirements.txt -e .
	@.venv/bin/uv pip install -q -p $(PY) "$$(grep ^pydensecrf2 requirements.txt)" 2> .venv/pydensecrf2.log \
		|| echo "pydensecrf2 (optional, a reference for tests) could not be compiled: see .venv/pydensecrf2.log"
	@touch $@

chromium:
	@command -v chromium chromium-browser google-chrome > /dev/null || { $(ROOT)apt-get update && $(ROOT)apt-get install -y --no-install-recommends chromium; }

book: .venv/ready ## build the book, serve it on this machine (SERVE=0: only build; PORT=8000)
	@rm -rf $(OUT)/_build/html $(OUT)/_build/.doctrees
	.venv/bin/jupyter-book build . -W --keep-going --path-output $(OUT)
ifneq ($(SERVE),0)
	@echo "The book: http://127.0.0.1:$(PORT)/ (Ctrl-C stops it)"
	@$(PY) -m http.server --bind 127.0.0.1 --directory $(OUT)/_build/html $(PORT)
endif

test: .venv/ready chromium ## all tests, then every cell of every chapter
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= SEGEDU_SCALE=mini $(PY) -m pytest chapters -n 2 --dist loadfile \
		--nbval-lax --nbval-current-env --nbval-cell-timeout 300 --nbval-sanitize-with tests/nbval.cfg

check: .venv/ready ## style and the fast tests, under two minutes
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile -m "not slow"

lab: .venv/ready ## the chapters in JupyterLab
	.venv/bin/jupyter lab chapters $(if $(ROOT),,--allow-root)

freeze: .venv/ready ## run the chapters and store their outputs
	$(PY) tools/freeze.py

record: .venv/ready ## make the recorded runs of results/ again
	$(PY) tools/record.py

bench: .venv/ready ## measure the package's speed
	$(PY) tools/bench.py

address: ## URL=https://github.com/ORG/REPO: where Colab finds this book (empty: nowhere)
	@python3 tools/address.py "$(URL)"
