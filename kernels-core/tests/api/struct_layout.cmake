# Compares what a program prints with a file, line by line.
execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE found COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE "\n$" "" found "${found}")
string(REPLACE "\n" ";" found "${found}")
file(STRINGS ${EXPECTED} expected)
if(NOT found STREQUAL expected)
  set(was ${expected})
  list(REMOVE_ITEM was ${found})
  set(is ${found})
  list(REMOVE_ITEM is ${expected})
  message(FATAL_ERROR "the layout of the public structs differs from ${EXPECTED}\n"
                      "was: ${was}\nis:  ${is}\n"
                      "Within a minor version only an Args struct may change, by fields that begin "
                      "at or after its old size; record them in that file")
endif()
