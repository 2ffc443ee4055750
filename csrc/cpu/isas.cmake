# SPDX-License-Identifier: BSD-3-Clause
# The kernels of each instruction set, compiled with its flags; backend.cpp picks one at run time. Sets `isas`, those built here.
#
# An ISA has only the parts that differ from the ISA before it: kernels, rows (those of routers) and integers (products of int8).
# Each part is a unit written into the build folder from unit.cpp.in, on the vectors of simd_<vectors>.h. amx has files.
set(x86 avx2 avxvnni avx512 avx512vnni avx512bf16 amx)
set(arm neon neondot)
set(parts_generic kernels rows integers)
set(parts_avx2 kernels rows integers)
set(parts_avxvnni integers)
set(parts_avx512 kernels rows integers)
set(parts_avx512vnni integers)
set(parts_avx512bf16 kernels)
set(parts_neon kernels integers)
set(parts_neondot integers)

foreach(isa IN LISTS x86 arm ITEMS generic)
  set(vectors_${isa} ${isa})
endforeach()
set(vectors_avxvnni avx2)
set(vectors_avx512vnni avx512)
set(vectors_avx512bf16 avx512)
set(vectors_neondot neon)

# the ISA whose parts each one takes over
set(below_avxvnni avx2)
set(below_avx512 avx2)
set(below_avx512vnni avx512)
set(below_avx512bf16 avx512vnni)
set(below_amx avx512bf16)

set(flags_avx2 -mavx2 -mfma -mf16c)
set(flags_avxvnni ${flags_avx2} -mavxvnni)
set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(flags_avx512vnni ${flags_avx512} -mavx512vnni)
set(flags_avx512bf16 ${flags_avx512} -mavx512bf16 -mavx512vbmi)
set(flags_amx ${flags_avx512bf16} -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8)
set(flags_neondot -march=armv8.2-a+dotprod)  # every AArch64 processor has NEON

# Scores, and activations in int8, have the same bits on every ISA, so compilers must not fuse multiplications and additions.
set(flags_rows -ffp-contract=off)
set(flags_integers -ffp-contract=off)
set(flags_rows_avx512 -mprefer-vector-width=512)  # plain loops: the compiler would choose narrower vectors
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(flags_integers_avx2 -fno-tree-ter)  # it multiplies ahead, with more registers than there are
  set(flags_integers_avx512 -fno-tree-ter)
  list(APPEND flags_neon -fno-schedule-insns)  # it moves all loads of a tile to the front, more than registers hold
  list(APPEND flags_neondot -fno-schedule-insns)
endif()

set(type_kernels Kernels)
set(type_rows RowKernels)
set(type_integers IntegerKernels)
set(headers_kernels kernels.h simd_<vectors>.h kernels.inl)
set(headers_rows rows.h rows.inl)
set(headers_integers integers/kernels.h simd_<vectors>.h integers/dot.h integers/kernels.inl)

# Rows are quick to compile, and other instruction sets run those of generic.
foreach(isa_and_flag ${SWITCHGEAR_ISA_FLAGS})
  if(NOT isa_and_flag MATCHES "^([a-z0-9]+):(-.+)$")
    message(FATAL_ERROR "SWITCHGEAR_ISA_FLAGS: expected a list of isa:flag, got ${SWITCHGEAR_ISA_FLAGS}")
  endif()
  if(NOT DEFINED vectors_${CMAKE_MATCH_1})  # one that is not built here is fine
    message(FATAL_ERROR "SWITCHGEAR_ISA_FLAGS: ${CMAKE_MATCH_1} is no instruction set of csrc/cpu/isas.cmake")
  endif()
  list(APPEND flags_kernels_${CMAKE_MATCH_1} ${CMAKE_MATCH_2})
  list(APPEND flags_integers_${CMAKE_MATCH_1} ${CMAKE_MATCH_2})
endforeach()

function(switchgear_add_part isa part source)
  target_sources(switchgear_core PRIVATE ${source})
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
                              "${flags_${isa}};${flags_${part}};${flags_${part}_${isa}}")
endfunction()

function(switchgear_write_part isa part)
  set(type ${type_${part}})
  list(TRANSFORM headers_${part} REPLACE "(.+)" "#include \"cpu/\\1\"\n" OUTPUT_VARIABLE includes)
  string(REPLACE "<vectors>" "${vectors_${isa}}" includes "${includes}")
  string(REPLACE ";" "" includes "${includes}")
  set(unit ${PROJECT_BINARY_DIR}/csrc/cpu/${part}_${isa}.cpp)
  configure_file(csrc/cpu/unit.cpp.in ${unit} @ONLY)
  switchgear_add_part(${isa} ${part} ${unit})
endfunction()

include(CheckCXXCompilerFlag)
set(candidates)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(candidates ${x86})
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    list(REMOVE_ITEM candidates amx)  # a process must request the tiles
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$" AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  set(candidates ${arm})
endif()
set(isas generic)
foreach(isa ${candidates})
  if(SWITCHGEAR_CPU_ISAS AND NOT isa IN_LIST SWITCHGEAR_CPU_ISAS)
    continue()
  endif()
  if(below_${isa} AND NOT below_${isa} IN_LIST isas)
    if(isa IN_LIST SWITCHGEAR_CPU_ISAS)
      message(FATAL_ERROR "SWITCHGEAR_CPU_ISAS: ${isa} needs ${below_${isa}}, got ${SWITCHGEAR_CPU_ISAS}")
    endif()
    continue()
  endif()
  list(JOIN flags_${isa} " " flags)
  string(TOUPPER ${isa} ISA)
  check_cxx_compiler_flag("${flags}" SWITCHGEAR_HAVE_${ISA})
  if(SWITCHGEAR_HAVE_${ISA})
    target_compile_definitions(switchgear_core PRIVATE SWITCHGEAR_HAVE_${ISA})
    list(APPEND isas ${isa})
  endif()
endforeach()
foreach(isa ${isas})
  foreach(part ${parts_${isa}})
    switchgear_write_part(${isa} ${part})
  endforeach()
endforeach()
if("amx" IN_LIST isas)
  switchgear_add_part(amx kernels csrc/cpu/kernels_amx.cpp)
  switchgear_add_part(amx integers csrc/cpu/integers/kernels_amx.cpp)
endif()
