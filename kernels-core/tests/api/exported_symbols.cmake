# Compares the dynamic symbols that a library defines with a list, one demangled symbol a line.
execute_process(COMMAND ${NM} --dynamic --defined-only --demangle --format=posix ${LIBRARY}
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE " [A-Za-z] [0-9a-f]+( [0-9a-f]+)?\n" "\n" symbols "${symbols}")
string(REGEX REPLACE "\n$" "" symbols "${symbols}")
string(REPLACE "\n" ";" found "${symbols}")
list(SORT found)
file(STRINGS ${EXPECTED} expected)
list(SORT expected)
if(NOT found STREQUAL expected)
  set(missing ${expected})
  list(REMOVE_ITEM missing ${found})
  set(unexpected ${found})
  list(REMOVE_ITEM unexpected ${expected})
  message(FATAL_ERROR "exported symbols differ from ${EXPECTED}\n"
                      "missing: ${missing}\nunexpected: ${unexpected}")
endif()
