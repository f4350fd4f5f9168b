#!/usr/bin/env bash
# llama.cpp with CUDA as a Python package, for machines that reach no network. Two steps:
#
#   bash bench/build_llama_cpp.sh trim llama_cpp_python-0.3.36.tar.gz FOLDER
#       FOLDER/llama_src.tar.xz (2 MB): of the source distribution what the two need that are built
#   bash bench/build_llama_cpp.sh build FOLDER/llama_src.tar.xz /tmp/llama
#       on the machine with the GPU (nvcc, cmake, ninja, gcc; 221 s on 32 cores for an H100): PYTHONPATH=/tmp/llama then
#       finds llama_cpp. It also takes diskcache, whose wheel may lie beside llama_src.tar.xz.
#
# Such a build may hold a static libstdc++: then llama_cpp must be imported before numpy, as bench/llama_cpp_peer.py does.
set -euo pipefail

trim() {
  local sources=$1 folder=$2 work
  work=$(mktemp -d)
  mkdir -p "$folder"
  tar xzf "$sources" -C "$work" --strip-components=1
  mv "$work/vendor/llama.cpp" "$work/whole"
  mkdir -p "$work/llama.cpp/ggml/src" "$work/llama.cpp/vendor"
  (
    cd "$work/whole"
    cp -r CMakeLists.txt LICENSE cmake include src "$work/llama.cpp"
    cp -r ggml/CMakeLists.txt ggml/cmake ggml/include "$work/llama.cpp/ggml"
    cp -r vendor/{CMakeLists.txt,hash,miniaudio,nlohmann,sheredom,stb} "$work/llama.cpp/vendor"
    find ggml/src -maxdepth 1 -type f -exec cp {} "$work/llama.cpp/ggml/src" \;
    cp -r ggml/src/ggml-cuda ggml/src/ggml-cpu ggml/src/ggml-blas "$work/llama.cpp/ggml/src"
  )
  XZ_OPT=-6 tar cJf "$folder/llama_src.tar.xz" -C "$work" llama.cpp llama_cpp
  rm -rf "$work"
  ls -la "$folder/llama_src.tar.xz"
}

build() {
  local sources target=$2 work nvcc root site
  sources=$(readlink -f "$1")
  work=$(mktemp -d)
  tar xJf "$sources" -C "$work"
  nvcc=$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc | tail -1)
  root=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  # Static or shared, cuBLAS may lie beside Python's packages.
  cmake -S "$work/llama.cpp" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_COMPILER="$nvcc" \
    -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90-real}" -DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DGGML_NATIVE=ON \
    -DGGML_CCACHE=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DBUILD_SHARED_LIBS=ON \
    -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
    -DCMAKE_INSTALL_RPATH="\$ORIGIN;$root/lib64;$site/nvidia/cu13/lib;$site/nvidia/cublas/lib;$site/nvidia/cuda_runtime/lib"
  ninja -C "$work/build" llama | tail -3
  rm -rf "$target"
  mkdir -p "$target/llama_cpp/lib"
  cp -r "$work/llama_cpp/." "$target/llama_cpp/"
  cp -a "$work"/build/bin/*.so* "$target/llama_cpp/lib/"
  for wheel in "$(dirname "$sources")"/diskcache-*.whl; do
    if [ -e "$wheel" ]; then python3 -m zipfile -e "$wheel" "$target"; fi
  done
  rm -rf "$work"
  (cd / && PYTHONPATH="$target" python3 -c '
import llama_cpp
print("llama_cpp", llama_cpp.__version__, "with a GPU:", llama_cpp.llama_supports_gpu_offload())')
}

case "${1:-} $#" in
  "trim 3") trim "$2" "$3" ;;
  "build 3") build "$2" "$3" ;;
  *) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3- >&2; exit 1 ;;
esac
