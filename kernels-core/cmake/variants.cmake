# flash_mla_variants(): the variant table of an operator, written at configure time.
#
#   flash_mla_variants(ROW cpu)                         the room's cpu.cc defines variant_cpu
#   flash_mla_variants(ROW sm90 KV bf16 fp16 D_QK 576)  one kernel per combination of the axes
#   flash_mla_variant_table()                           closes the room: writes <room>/variants.h
#   flash_mla_list_variants()                           closes all: writes variants.txt
#
# The order of the calls, and of the values in them, is the order of preference. Each combination
# becomes a .cu file that instantiates the row's launch.cuh for a Cfg, in the build tree. The CPU's one
# variant serves what any other of its room does, and the axes that its own call names.

set(flash_mla_axes KV Q D_QK TILE_M)

function(flash_mla_axis_value axis value out)
  set(kv_bf16 kBf16)
  set(kv_fp16 kFp16)
  set(kv_fp8 kFp8)
  set(kv_v32_fp8 kV32Fp8)
  set(kv_v4_fp8 kV4Fp8)
  set(kv_v41_fp8 kV41Fp8)
  set(kv_v41_fp4 kV41Fp4)
  set(q_bf16 kBFloat16)
  set(q_fp16 kFloat16)
  set(q_fp32 kFloat32)
  set(q_e4m3 kFloat8E4M3)
  if(axis STREQUAL KV AND DEFINED kv_${value})
    set(${out} ".kv = KvFormat::${kv_${value}}" PARENT_SCOPE)
  elseif(axis STREQUAL Q AND DEFINED q_${value})
    set(${out} ".q = DType::${q_${value}}" PARENT_SCOPE)
  elseif(axis STREQUAL D_QK)
    set(${out} ".d_qk = ${value}" PARENT_SCOPE)
  elseif(axis STREQUAL TILE_M)
    set(${out} ".tile_m = ${value}" PARENT_SCOPE)
  else()
    message(FATAL_ERROR "flash_mla_variants: ${axis} has no value '${value}'")
  endif()
endfunction()

# A room is a folder under src: mha_prefill_dense/backward has the namespace
# flash_mla::mha_prefill_dense_backward.
function(flash_mla_room room namespace)
  file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR}/src ${CMAKE_CURRENT_SOURCE_DIR})
  string(REPLACE / _ name ${path})
  set(${room} ${path} PARENT_SCOPE)
  set(${namespace} ${name} PARENT_SCOPE)
endfunction()

function(flash_mla_variants)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "ROW" "${flash_mla_axes}")
  flash_mla_room(ROOM NAMESPACE)
  list(JOIN ARGV " " arguments)
  set_property(GLOBAL APPEND PROPERTY flash_mla_calls "${ROOM} ${arguments}")
  set(names "")
  if(arg_ROW STREQUAL cpu)
    target_sources(flash_mla_host PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/cpu.cc)
    set(names cpu)
  elseif(flash_mla_row_${arg_ROW}_flags)
    # The product of the axes, in the order of flash_mla_axes: `names` and `fields` run in parallel.
    set(names ${arg_ROW})
    set(fields " ")
    foreach(axis IN LISTS flash_mla_axes)
      if(arg_${axis})
        set(next_names "")
        set(next_fields "")
        foreach(name field IN ZIP_LISTS names fields)
          foreach(value IN LISTS arg_${axis})
            flash_mla_axis_value(${axis} ${value} initializer)
            list(APPEND next_names ${name}_${value})
            list(APPEND next_fields "${field}${initializer}, ")
          endforeach()
        endforeach()
        set(names ${next_names})
        set(fields "${next_fields}")
      endif()
    endforeach()
    set(ROW ${arg_ROW})
    foreach(NAME FIELDS IN ZIP_LISTS names fields)
      set(file ${PROJECT_BINARY_DIR}/generated/${ROOM}/${NAME}.cu)
      configure_file(${PROJECT_SOURCE_DIR}/cmake/variant.cu.in ${file} @ONLY)
      target_sources(flash_mla_${arg_ROW} PRIVATE ${file})
    endforeach()
  endif()
  set_property(DIRECTORY APPEND PROPERTY flash_mla_variant_names ${names})
endfunction()

function(flash_mla_variant_table)
  flash_mla_room(ROOM NAMESPACE)
  get_property(names DIRECTORY PROPERTY flash_mla_variant_names)
  list(LENGTH names COUNT)
  set(DECLARATIONS "")
  set(POINTERS "")
  foreach(name IN LISTS names)
    string(APPEND DECLARATIONS "extern const Variant<Problem> variant_${name};\n")
    string(APPEND POINTERS "&variant_${name}, ")
  endforeach()
  configure_file(${PROJECT_SOURCE_DIR}/cmake/variants.h.in
                 ${PROJECT_BINARY_DIR}/generated/${ROOM}/variants.h @ONLY)
endfunction()

# One line per call of flash_mla_variants, whatever this build compiles: for ci/support_matrix.py.
function(flash_mla_list_variants)
  get_property(calls GLOBAL PROPERTY flash_mla_calls)
  list(JOIN calls "\n" lines)
  file(WRITE ${PROJECT_BINARY_DIR}/generated/variants.txt "${lines}\n")
endfunction()
