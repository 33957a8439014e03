# Whether and with which nvcc the CUDA backend is built. Sets TORCH_FP8_HAS_CUDA and, where that is on,
# TORCH_FP8_CUDA_VERSION, else TORCH_FP8_NO_CUDA_REASON; enables the CUDA language where it is on.
set(TORCH_FP8_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO (where possible), ON (or fail), OFF")

set(TORCH_FP8_HAS_CUDA OFF)
if(TORCH_FP8_CUDA STREQUAL "OFF")
  set(TORCH_FP8_NO_CUDA_REASON "TORCH_FP8_CUDA=OFF was asked for")
elseif(NOT TORCH_CUDA)
  set(TORCH_FP8_NO_CUDA_REASON "PyTorch ${TORCH_VERSION} is a CPU build")
else()
  string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TORCH_CUDA}")
  # A toolkit of the machine, or the one that PyPI's nvidia-cuda-nvcc puts beside torch.
  find_program(TORCH_FP8_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME
               PATHS /usr/local/cuda "${TORCH_ROOT}/../nvidia/cu${torch_cuda_major}" PATH_SUFFIXES bin)
  if(NOT TORCH_FP8_NVCC)
    set(TORCH_FP8_NO_CUDA_REASON "no nvcc was found; install the CUDA ${TORCH_CUDA} toolkit or pip install nvidia-cuda-nvcc==${TORCH_CUDA}.*")
  else()
    execute_process(COMMAND ${TORCH_FP8_NVCC} --version OUTPUT_VARIABLE nvcc_version)
    string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" _ "${nvcc_version}")
    set(nvcc_major "${CMAKE_MATCH_1}")
    set(nvcc_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    # Kernels compiled with newer headers than the libraries that torch loads would miss symbols there.
    if(NOT nvcc_major STREQUAL torch_cuda_major OR nvcc_version VERSION_GREATER TORCH_CUDA)
      set(TORCH_FP8_NO_CUDA_REASON "nvcc ${nvcc_version} does not fit PyTorch's CUDA ${TORCH_CUDA}: the same major version and no newer minor version is needed")
    else()
      set(TORCH_FP8_HAS_CUDA ON)
    endif()
  endif()
endif()

if(TORCH_FP8_HAS_CUDA)
  set(TORCH_FP8_CUDA_VERSION "${nvcc_version}")
  message(STATUS "torch_fp8: CUDA backend for sm_90a with nvcc ${nvcc_version} (${TORCH_FP8_NVCC})")
  set(CMAKE_CUDA_COMPILER "${TORCH_FP8_NVCC}")
  set(CMAKE_CUDA_ARCHITECTURES 90a-real)
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # linked below: the one that torch loads
  # PyPI's toolkit has its libraries under names with a version only, which a linker test would not find.
  set(CMAKE_CUDA_COMPILER_FORCED ON)
  enable_language(CUDA)
elseif(TORCH_FP8_CUDA STREQUAL "ON")
  message(FATAL_ERROR "torch_fp8: TORCH_FP8_CUDA=ON, but ${TORCH_FP8_NO_CUDA_REASON}")
else()
  message(WARNING "torch_fp8: building the CPU backend only: ${TORCH_FP8_NO_CUDA_REASON}")
endif()

# The CUDA libraries that torch loads, by the names it loads them under, so that there is one copy in the process.
if(TORCH_FP8_HAS_CUDA)
  get_filename_component(toolkit_bin "${TORCH_FP8_NVCC}" REALPATH)
  get_filename_component(toolkit_bin "${toolkit_bin}" DIRECTORY)
  get_filename_component(toolkit "${toolkit_bin}" DIRECTORY)
  add_library(torch_fp8_cuda INTERFACE)
  target_include_directories(torch_fp8_cuda SYSTEM INTERFACE "${toolkit}/include")
  foreach(library cudart cublasLt)
    find_library(TORCH_FP8_${library} NAMES lib${library}.so.${nvcc_major} ${library} NO_DEFAULT_PATH REQUIRED
                 PATHS "${TORCH_ROOT}/../nvidia/cu${nvcc_major}" "${toolkit}" PATH_SUFFIXES lib lib64)
    target_link_libraries(torch_fp8_cuda INTERFACE "${TORCH_FP8_${library}}")
    cmake_path(GET TORCH_FP8_${library} PARENT_PATH TORCH_FP8_CUDA_LIBRARY_DIR)
  endforeach()
endif()

# FP8 attention is cuDNN's, described through cudnn-frontend: headers of both, and nothing is linked.
# TORCH_FP8_CUDNN_FRONTEND, of CMake or of the environment, is the frontend's folder where it is not beside torch.
set(TORCH_FP8_NO_ATTENTION_REASON "")
if(TORCH_FP8_HAS_CUDA)
  set(site "${TORCH_ROOT}/..")
  find_path(TORCH_FP8_CUDNN_FRONTEND cudnn_frontend.h HINTS ENV TORCH_FP8_CUDNN_FRONTEND "${site}/include"
            DOC "The folder of cudnn_frontend.h")
  find_path(TORCH_FP8_CUDNN cudnn.h HINTS "${site}/nvidia/cudnn/include"
            DOC "The folder of cudnn.h")
  find_path(TORCH_FP8_NVRTC nvrtc.h HINTS "${toolkit}/include" "${site}/nvidia/cuda_nvrtc/include"
            DOC "The folder of nvrtc.h")
  set(oldest_frontend 1.23)
  if(TORCH_FP8_CUDNN_FRONTEND)
    file(STRINGS "${TORCH_FP8_CUDNN_FRONTEND}/cudnn_frontend_version.h" frontend_version REGEX "_VERSION [0-9]+$")
    string(REGEX REPLACE "[^0-9;]" "" frontend_version "${frontend_version}")
    string(REPLACE ";" "." frontend_version "${frontend_version}")
  endif()
  if(NOT TORCH_FP8_CUDNN_FRONTEND)
    set(TORCH_FP8_NO_ATTENTION_REASON "cudnn_frontend.h was not found; pip install nvidia-cudnn-frontend beside torch")
  elseif(frontend_version VERSION_LESS oldest_frontend)
    set(TORCH_FP8_NO_ATTENTION_REASON "cudnn-frontend was ${frontend_version}; pip install 'nvidia-cudnn-frontend>=${oldest_frontend}'")
  elseif(NOT TORCH_FP8_CUDNN)
    set(TORCH_FP8_NO_ATTENTION_REASON "cudnn.h was not found; pip install nvidia-cudnn-cu${nvcc_major} beside torch")
  elseif(NOT TORCH_FP8_NVRTC)
    set(TORCH_FP8_NO_ATTENTION_REASON "nvrtc.h was not found; pip install nvidia-cuda-nvrtc beside torch")
  else()
    message(STATUS "torch_fp8: FP8 attention with cudnn-frontend ${frontend_version} (${TORCH_FP8_CUDNN_FRONTEND})")
    set(attention_options -DNV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING -DCUDNN_FRONTEND_SKIP_JSON_LIB
                          -DTORCH_FP8_CUDNN)
    foreach(folder TORCH_FP8_CUDNN_FRONTEND TORCH_FP8_CUDNN TORCH_FP8_NVRTC)
      list(APPEND attention_options -isystem "${${folder}}")
    endforeach()
    set_source_files_properties(csrc/cuda/attention/sdpa.cpp PROPERTIES COMPILE_OPTIONS "${attention_options}")
    target_link_libraries(torch_fp8_cuda INTERFACE ${CMAKE_DL_LIBS})
  endif()
  if(TORCH_FP8_NO_ATTENTION_REASON)
    message(WARNING "torch_fp8: building without FP8 attention: ${TORCH_FP8_NO_ATTENTION_REASON}")
  endif()
endif()
