# The software bill of materials of a wheel (PEP 770): what is compiled in. auditwheel adds another
# one for the shared libraries that it puts beside.

set(components "")
macro(flash_mla_sbom_component name version license)  # license: SPDX "id", or "name" without one
  string(APPEND components "${separator}{\"type\": \"library\", \"name\": \"${name}\", "
                           "\"version\": \"${version}\", \"licenses\": [{\"license\": {${license}}}]}")
  set(separator ",\n    ")
endmacro()

if(FLASH_MLA_WITH_CUDA)
  flash_mla_sbom_component(cuda-toolkit ${CUDAToolkit_VERSION} "\"name\": \"NVIDIA CUDA Toolkit EULA\"")
endif()
if(needs_cutlass)
  file(STRINGS ${CUTLASS_INCLUDE_DIR}/cutlass/version.h lines REGEX "define CUTLASS_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" numbers "${lines}")
  string(REPLACE ";" "." version "${numbers}")
  flash_mla_sbom_component(cutlass ${version} "\"id\": \"BSD-3-Clause\"")
endif()

set(sbom ${CMAKE_CURRENT_BINARY_DIR}/libflash_mla.cdx.json)
configure_file(${CMAKE_CURRENT_LIST_DIR}/sbom.cdx.json.in ${sbom} @ONLY)
install(FILES ${sbom} DESTINATION ${SKBUILD_METADATA_DIR}/sboms)
