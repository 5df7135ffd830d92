# The shared library, what it exports, and its installation.

add_library(flash_mla SHARED)
add_library(flash_mla::flash_mla ALIAS flash_mla)
target_include_directories(flash_mla PUBLIC
                           $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>
                           $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(flash_mla PUBLIC cxx_std_17)  # consumers' headers need no more
target_link_libraries(flash_mla PRIVATE ${flash_mla_object_libraries} OpenMP::OpenMP_CXX)
if(FLASH_MLA_WITH_CUDA)
  if(FLASH_MLA_CUDART STREQUAL static)
    target_link_libraries(flash_mla PRIVATE CUDA::cudart_static)
  else()
    target_link_libraries(flash_mla PRIVATE CUDA::cudart)
  endif()
endif()
# Symbols of the static CUDA runtime and of the standard library's templates stay inside; -z defs
# makes an undefined symbol a link error.
target_link_options(flash_mla PRIVATE -Wl,--exclude-libs,ALL
                    -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map)
set_target_properties(flash_mla PROPERTIES
                      LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map)
if(NOT FLASH_MLA_SANITIZE)
  target_link_options(flash_mla PRIVATE -Wl,-z,defs)
endif()
if(FLASH_MLA_SOVERSION)
  set_target_properties(flash_mla PROPERTIES VERSION ${PROJECT_VERSION}
                        SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
endif()

include(CMakePackageConfigHelpers)
set(FLASH_MLA_CMAKE_DIR share/cmake/flash_mla)
install(TARGETS flash_mla EXPORT flash_mla_targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/flash_mla DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT flash_mla_targets NAMESPACE flash_mla:: FILE flash_mla-targets.cmake
        DESTINATION ${FLASH_MLA_CMAKE_DIR})
configure_package_config_file(cmake/flash_mla-config.cmake.in
                              ${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config.cmake
                              INSTALL_DESTINATION ${FLASH_MLA_CMAKE_DIR})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/flash_mla-config-version.cmake
        DESTINATION ${FLASH_MLA_CMAKE_DIR})
