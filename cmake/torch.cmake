# PyTorch as the imported target torch_fp8_torch, from a Python environment's torch folder or from LibTorch.
#
# TorchConfig.cmake is not used for the build itself: without a GPU it asks nvcc for architectures that CUDA 13 no
# longer has, and without nvcc it fails where only the CPU backend is wanted.
if(NOT TORCH_ROOT)
  find_package(Python3 COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE TORCH_ROOT
    OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT EXISTS "${TORCH_ROOT}/include/torch/library.h")
  message(FATAL_ERROR "torch_fp8: no PyTorch at '${TORCH_ROOT}'. Install one (pip install torch), or give the path of "
                      "a torch folder or an unpacked LibTorch: -DTORCH_ROOT=...")
endif()

# TORCH_VERSION ("2.11.0") and TORCH_CUDA ("13.0", or "" for a CPU build).
if(EXISTS "${TORCH_ROOT}/version.py")
  file(STRINGS "${TORCH_ROOT}/version.py" torch_version_py)
  string(REGEX MATCH "__version__ = '([0-9.]+)" _ "${torch_version_py}")
  set(TORCH_VERSION "${CMAKE_MATCH_1}")
  string(REGEX MATCH "cuda: Optional\\[str\\] = '([0-9.]+)'" _ "${torch_version_py}")
  set(TORCH_CUDA "${CMAKE_MATCH_1}")
else()
  file(STRINGS "${TORCH_ROOT}/build-version" torch_build_version)
  string(REGEX MATCH "^([0-9.]+)(\\+cu([0-9]+)([0-9]))?" _ "${torch_build_version}")
  set(TORCH_VERSION "${CMAKE_MATCH_1}")
  set(TORCH_CUDA "")
  if(CMAKE_MATCH_3)
    set(TORCH_CUDA "${CMAKE_MATCH_3}.${CMAKE_MATCH_4}")
  endif()
endif()

add_library(torch_fp8_torch INTERFACE IMPORTED)
target_include_directories(torch_fp8_torch SYSTEM INTERFACE "${TORCH_ROOT}/include"
                                                            "${TORCH_ROOT}/include/torch/csrc/api/include")
set(torch_libraries torch torch_cpu c10)
if(TORCH_CUDA)
  list(APPEND torch_libraries torch_cuda c10_cuda)
endif()
foreach(library IN LISTS torch_libraries)
  target_link_libraries(torch_fp8_torch INTERFACE "${TORCH_ROOT}/lib/lib${library}.so")
endforeach()
