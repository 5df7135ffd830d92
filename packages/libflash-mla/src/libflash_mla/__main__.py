from libflash_mla import cmake_prefix_path

print(cmake_prefix_path())
