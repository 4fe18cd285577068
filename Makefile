# The commands that people and CI use; each sets the project up first (once).
PYTHON_BIN := .venv/bin/python

.PHONY: setup demo test test-stock test-gpu test-scaleout exactness history fuzz fuzz-parsers bench bench-capacity bench-client bench-engine bench-live bench-training bench-joint unit unit-ext unit-rest check check-symbols format clean

setup: ## make .venv and install what this machine needs; a second run does nothing
	@deploy/setup.sh

demo: setup ## from rows to answers; BASE=... DATA=id.json NAME=... for your own
	$(PYTHON_BIN) -P examples/demo.py $(if $(BASE),--base-model '$(BASE)') $(if $(DATA),--data '$(DATA)') $(if $(NAME),--name '$(NAME)')

test: setup ## all tests, with real vLLM
	$(PYTHON_BIN) -m pytest

test-stock: setup ## the failures of plain vLLM, shown on plain vLLM and mended with the plugin
	$(PYTHON_BIN) -m pytest tests/stock

test-gpu: setup ## what must hold on a GPU; skipped with the reason where there is none
	$(PYTHON_BIN) -m pytest tests/gpu

test-scaleout: setup ## a fleet of two real replicas on Ray Serve; installs the extra `ray`; eight minutes on a busy machine
	$(PYTHON_BIN) -m pip install --quiet -e '.[ray]'
	$(PYTHON_BIN) -m pytest --timeout 900 -s tests/scaleout

exactness: setup ## 2,000 comparisons in each dtype: no row feels its neighbours' adapters
	EXACTNESS_COMPARISONS=2000 $(PYTHON_BIN) -m pytest --timeout 3600 -rP tests/engine/test_exactness.py

history: setup ## 5,000 requests while 50 adapters change and the server is killed: none gets what it should not
	HISTORY_REQUESTS=5000 $(PYTHON_BIN) -m pytest --timeout 3600 -s tests/history

fuzz: setup ## 10,000 generated adapters and headers for each property; about half an hour
	FUZZ_EXAMPLES=10000 $(PYTHON_BIN) -m pytest tests/fuzz

fuzz-parsers: setup ## coverage-guided, a minute each, with atheris
	$(PYTHON_BIN) -m pip install --quiet -e '.[fuzz]'
	$(PYTHON_BIN) -m tests.fuzz.parsers json -max_total_time=60
	$(PYTHON_BIN) -m tests.fuzz.parsers header -max_total_time=60

bench: setup ## ours and plain vLLM with the same adapters under the load test; 5 minutes on an idle machine
	$(PYTHON_BIN) -m benchmarks.bench_serving

bench-capacity: setup ## the table of docs/operations.md, which it writes; 12 minutes on an idle machine
	$(PYTHON_BIN) -m benchmarks.bench_capacity --write-docs

bench-client: setup ## what the load test's own client adds to the figures; 2 minutes
	$(PYTHON_BIN) -m benchmarks.bench_load_client --json-out .cache/benchmarks/load_client.json

bench-engine: setup ## what LoRA costs, how much a load disturbs, how fast adapters are taken; on an idle machine
	$(PYTHON_BIN) -m benchmarks.bench_lora_tax --json-out .cache/benchmarks/lora_tax.json
	$(PYTHON_BIN) -m benchmarks.bench_load_stall --json-out .cache/benchmarks/load_stall.json
	$(PYTHON_BIN) -m benchmarks.bench_admission --json-out .cache/benchmarks/admission.json

bench-live: setup ## what the front costs, and a thousand adapters against eight; an hour on an idle machine
	$(PYTHON_BIN) -m benchmarks.bench_front
	$(PYTHON_BIN) -m benchmarks.bench_many_adapters

bench-training: setup ## samples per second, memory and time to the probes, against the classic script; 15 minutes
	$(PYTHON_BIN) -m benchmarks.bench_training
	$(PYTHON_BIN) -m benchmarks.bench_training --probes

bench-joint: setup ## several identities in one run against a run for each; 25 minutes on an idle machine
	$(PYTHON_BIN) -m benchmarks.bench_joint_training
	$(PYTHON_BIN) -m benchmarks.bench_joint_training --probes --rounds 1

unit: setup ## the fast part, no vLLM; two halves at a time, which takes two cores under a minute
	$(MAKE) -j2 --output-sync=target unit-ext unit-rest

unit-ext: setup
	$(PYTHON_BIN) -m pytest tests/unit/vllm_lora_ext

unit-rest: setup
	$(PYTHON_BIN) -m pytest tests/unit --ignore=tests/unit/vllm_lora_ext tests/structure

check: setup ## format, lint, types, structure, and everything in deploy/; nothing of it needs a network
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m mypy
	$(PYTHON_BIN) -m pytest -q tests/structure tests/deploy --ignore tests/deploy/test_command_line.py

VERSION ?= 0.33.0
check-symbols: setup ## what vLLM VERSION lacks of what we touch; downloads its wheel, installs nothing
	$(PYTHON_BIN) -P deploy/check_symbols.py $(VERSION)

format: setup ## put the code in shape
	$(PYTHON_BIN) -m ruff format .
	$(PYTHON_BIN) -m ruff check --fix .

clean: ## remove what was made, but not .venv
	rm -rf .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache
