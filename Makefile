# Everything runs in .venv, which `make setup` creates. PYTHON is the interpreter to create it with (3.11 or later).

PYTHON ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-from-constraints
DEMO_SIZE := und_len=1:1024:4096,frames=1:3:5,height=3:6:12,width=3:8:20,sound_len=0:16:64,action_len=0
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadgroup --durations=30

.PHONY: setup test test-0 test-1 test-all demo lint docs coverage schema clean

setup: $(STAMP)

# torch alone and exactly first: where a file or an index with its CPU build is configured, that one is taken, and the
# second call finds the requirement satisfied.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[compile,calibrate,modelopt,rtx,run,serve,sign,kernels,dev]" -c constraints.txt
	touch $@

test: setup
	$(PYTEST) $(PARALLEL) -m "not tier3"

test-0: setup
	$(PYTEST) $(PARALLEL) -m tier0

test-1: setup
	$(PYTEST) $(PARALLEL) -m "tier0 or tier1"

test-all: setup
	$(PYTEST) $(PARALLEL)

demo: setup
	$(BIN)/cosmos-export demo-checkpoint --variant omni -o demo/checkpoint --dtype bfloat16 --force
	$(BIN)/cosmos-export build demo/checkpoint -o demo/bundle --target rtx-pro-6000 --profile 256p-17f+sound --force
	$(BIN)/cosmos-export bundle verify demo/bundle
	$(BIN)/cosmos-export run demo/bundle --prompt "A robot arm folds a towel." --sound --backend onnxruntime \
		-o demo/towel.mp4 --force
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_cpu.py --checkpoint demo/checkpoint --bundle demo/bundle \
		--steps 8 --runs 1
	$(BIN)/cosmos-export calibrate demo/checkpoint --data calibration/prompts.txt,licence=Apache-2.0,origin=synthetic \
		--latents rollout --modalities vision,sound --samples 32 --steps 8 --frames 9 --profile $(DEMO_SIZE) -o demo/scales --force
	$(BIN)/cosmos-export build demo/checkpoint -o demo/fp8 --target rtx-pro-6000 --profile 256p-17f+sound \
		--modalities vision,sound --recipe fp8 --calibration demo/scales --quality report --force
	$(BIN)/cosmos-export bundle verify demo/fp8
	$(BIN)/cosmos-export run demo/fp8 --prompt "A robot arm folds a towel." --sound --backend onnxruntime \
		-o demo/towel-fp8.mp4 --force

# mypy sees the installed form: in the source tree passes/, kernels/, calibration/ and targets/ are beside the package.
# The whole of build/ goes first, since setuptools would install what an earlier tree left there.
lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache --strict -p cosmos_export

# The pages as a site in build/site. A link that leads nowhere fails it.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" -c constraints.txt
	$(BIN)/python -m mkdocs build --quiet --strict

coverage: setup
	$(PYTEST) $(PARALLEL) --cov=passes --cov=cosmos_export/ir --cov-report=term-missing:skip-covered --cov-fail-under=95

schema: setup
	$(BIN)/python -c "from cosmos_export.bundle.manifest import schema_text; print(schema_text(), end='')" \
		> docs/manifest.schema.json

clean:
	rm -rf build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
