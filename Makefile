# The project's verbs. Everything is installed into .venv; nothing else on the machine is touched.
#
#   make demo    real video in, new video out: prints the path of the report page
#   make test    the tests               make bench   the benchmarks
#   make lint    ruff, mypy, file sizes  make resources   registers, memory and bounds of every kernel
#   make docs    the documentation site in build/site
#   make hub     the kernels in build/hub, in the layout of Hugging Face's kernel-builder (kernels/README.md)
#   make proof   every kernel by the IR that Triton compiles, without a GPU: writes kernels/PROOF.md; hours, proof-share minutes
#   make faults  break it on purpose: writes docs/faults.md; hours, and as root, for full disks and other users
#
# Without an NVIDIA driver PyTorch 2.13.0 is installed, else the newest. PyPI's wheel holds CUDA and is several times as large
# as the one for CPUs: to take that, give TORCH_INDEX=https://download.pytorch.org/whl/cpu. A PyTorch for GPUs brings the
# Triton that it needs; without one the tests take the version in kernels/RESOURCES.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := runs/demo
CLIPS := runs/demo-clips
HUB ?= build/hub
DRIVER := $(shell command -v nvidia-smi)
TORCH := $(if $(DRIVER),torch>=2.10,torch==2.13.0)
TRITON := $(if $(DRIVER),,triton==3.9.0)
# Processes that share the tests: as many as processors, and four at most, since each of them loads PyTorch.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
TORCH_ARGS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test bench lint docs resources proof proof-share hub faults clean
.DELETE_ON_ERROR:
# A training that was interrupted is resumed; without its options it could not be.
.PRECIOUS: $(RUN)/options.json

demo: $(RUN)/report/index.html
	@$(BIN)/vglann report $(RUN)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest --benchmark-only

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@long=$$(git ls-files '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 400'); \
	 if [ -n "$$long" ]; then echo "over 400 lines:"; echo "$$long"; exit 1; fi

# Without --quiet, under which a broken link is not an error. The variable hides an advertisement.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --config-file docs/mkdocs.yml

resources: $(VENV)/installed-test
	$(BIN)/python -m vglann_kernels.resources

proof: $(VENV)/proof
	PYTHONPATH=$(VENV)/proof OMP_NUM_THREADS=1 $(BIN)/python -m vglann_kernels.proof

# What CI repeats of it. The tests show first that faults are found.
proof-share: $(VENV)/proof
	PYTHONPATH=$(VENV)/proof OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels/test_proof.py
	PYTHONPATH=$(VENV)/proof OMP_NUM_THREADS=1 $(BIN)/python -m vglann_kernels.proof --share --check

# The builder writes a _ops.py of its own.
hub:
	rm -rf $(HUB)/torch-ext
	mkdir -p $(HUB)/torch-ext
	cp kernels/build.toml kernels/flake.nix LICENSE $(HUB)
	cd kernels && find vglann_kernels -name '*.py' ! -name _ops.py -exec cp --parents {} $(abspath $(HUB))/torch-ext \;

faults: $(VENV)/installed-test
	PYTHONPATH=tests:tests/fixtures OMP_NUM_THREADS=1 $(BIN)/python -m faults.report $(PARTS)

clean:
	rm -rf $(VENV) runs/demo runs/demo-clips

# ---- the demo, one file after the other; a second call makes only what is missing

$(CLIPS)/index.json: | $(VENV)/installed-demo
	media=$$($(BIN)/vglann clips fetch S | cut -d: -f1) && $(BIN)/vglann clips pack "$$media" --out $(CLIPS)

$(RUN)/options.json: | $(CLIPS)/index.json
	$(BIN)/vglann train $(CLIPS) --preset demo --out $(RUN)

$(RUN)/mapping/imle/mapping.json: $(RUN)/options.json
	$(BIN)/vglann train --resume $(RUN)
	$(BIN)/vglann map $(RUN)

$(RUN)/report/index.html: $(RUN)/mapping/imle/mapping.json
	$(BIN)/vglann reconstruct $(RUN)
	$(BIN)/vglann sample $(RUN) -n 16
	$(BIN)/vglann interpolate $(RUN)
	$(BIN)/vglann report $(RUN)

# ---- installation

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH_ARGS) '$(TORCH)'
	touch $@

$(VENV)/installed-%: pyproject.toml | $(VENV)/torch
	$(PIP) install -q -e '.[$*]' $(if $(filter test,$*),$(TRITON))
	touch $@

# A folder of its own, which nothing else imports.
$(VENV)/proof: kernels/proof.txt | $(VENV)/installed-test
	rm -rf $@ $@.new
	$(PIP) install -q --target $@.new --no-deps --ignore-requires-python --require-hashes -r $<
	mv $@.new $@
	touch $@
