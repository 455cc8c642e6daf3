.PHONY: setup quality test bench docs

setup:  ## virtual environment with vLLM for CPUs and every tool
	bash scripts/setup.sh

quality: setup  ## ruff (check, format) and pyright over the whole tree
	bash scripts/quality.sh

test:  ## quality, docs and the whole suite; a part of it: make test ARGS='tests/unit -k planner'
	bash scripts/test.sh $(ARGS)

bench: ARGS ?= --quick
bench: setup  ## plain, stock and SSD decoding; a few minutes, or as ARGS say (scripts/bench_decode.py --help)
	.venv/bin/python scripts/bench_decode.py --out bench-output $(ARGS)

docs: setup  ## the documentation site into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
