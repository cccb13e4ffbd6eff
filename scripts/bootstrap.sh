# shellcheck shell=bash
# Sets up what sag is built with. Sourced by demo.sh and test.sh, which then call
#
#   sag_bootstrap [tools|tests]  system packages, LibTorch, a CUDA compiler, a new enough CMake; what tools/ and the tests in
#                                Python need; doxygen, for the tests
#   sag_build [<target>...]      configures and builds build/release (everything, or the targets named)
#
# What is downloaded, and the compiler's cache, lie outside the clone, in one folder that later clones use again:
#
#   SAG_CACHE_DIR      that folder; default ${XDG_CACHE_HOME:-~/.cache}/sag
#   Torch_DIR, CMAKE_PREFIX_PATH      your own LibTorch, in place of the download
#   CUDACXX, CUDA_HOME                your own CUDA compiler
#   CMAKE_BUILD_PARALLEL_LEVEL        how many jobs run at once
#   SAG_WARNINGS_AS_ERRORS=ON         as CI builds; OFF by default, for compilers that nobody has tried yet

sag_cuda_version=13.0
sag_cmake_version=3.31.10
sag_cmake_minimum=3.25
sag_needed_gib=8

sag_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
sag_torch_version=$(sed -n 's/^set(sag_torch_tested \(.*\))$/\1/p' "$sag_root/cmake/SagTorch.cmake")
sag_build_dir=$sag_root/build/release
sag_cache=${SAG_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/sag}
sag_cmake=cmake
# shellcheck disable=SC2034  # test.sh reads it
sag_ctest=ctest
sag_configure_args=()
sag_partial=''
sag_child=''

say() { printf 'sag: %s\n' "$*"; }
die() {
  printf 'sag: %s\n' "$*" >&2
  exit 1
}

sag_bootstrap() {
  trap sag_clean_up EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  sag_system_packages "${1:-}"
  sag_open_cache
  sag_find_cmake
  sag_find_torch
  sag_find_nvcc
  [[ -z ${1:-} ]] || sag_find_tools
  sag_close_cache
}

# --- System packages --------------------------------------------------------------------------------------------------

sag_system_packages() {
  local missing=()
  sag_look_for_packages "${1:-}"
  ((${#missing[@]})) || return 0
  local list="${missing[*]}" sudo=()
  command -v apt-get >/dev/null ||
    die "these are missing (by their Debian names), and there is no apt-get here to install them: $list"
  if ((EUID != 0)); then
    command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 ]]; } ||
      die "these packages are missing, and installing them needs root: apt-get install $list"
    sudo=(sudo)
  fi
  say "installing system packages: $list"
  "${sudo[@]}" apt-get update -qq || die "apt-get update failed; is there a network? Missing packages: $list"
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
    >/dev/null || die "apt-get could not install (is there a network?): $list"
  missing=()
  sag_look_for_packages "${1:-}"
  ((${#missing[@]} == 0)) || die "still missing after apt-get install: ${missing[*]}"
}

# Appends to `missing`. Looks for the thing itself, not for the package: it may have come another way.
sag_look_for_packages() {
  command -v cmake >/dev/null || missing+=(cmake)
  command -v ninja >/dev/null || missing+=(ninja-build)
  command -v ccache >/dev/null || ! sag_may_install || missing+=(ccache)
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3 python3-venv)
  if ! command -v "${CXX:-c++}" >/dev/null; then
    missing+=(g++)
  fi
  sag_look_for_header gtest/gtest.h libgtest-dev
  sag_look_for_header gmock/gmock.h libgmock-dev
  sag_look_for_header fmt/format.h libfmt-dev
  sag_look_for_header CLI/CLI.hpp libcli11-dev
  sag_look_for_header nlohmann/json.hpp nlohmann-json3-dev
  sag_look_for_header png.h libpng-dev
  if [[ ${1:-} == tests ]]; then
    command -v doxygen >/dev/null || ! sag_may_install || missing+=(doxygen)
  fi
}

sag_look_for_header() {
  echo "#include <$1>" | "${CXX:-c++}" -std=c++17 -E -x c++ - >/dev/null 2>&1 || missing+=("$2")
}

# ccache and doxygen are worth installing, not worth failing for.
sag_may_install() {
  command -v apt-get >/dev/null && { ((EUID == 0)) || sudo -n true 2>/dev/null; }
}

# --- The cache --------------------------------------------------------------------------------------------------------
# Every entry is made as <name>.partial and renamed when it is complete, so an entry that exists is whole.

sag_open_cache() {
  mkdir -p "$sag_cache" 2>/dev/null && [[ -w $sag_cache ]] ||
    die "cannot write to $sag_cache; name another folder in SAG_CACHE_DIR"
  sag_cache=$(cd "$sag_cache" && pwd)
  exec 8>"$sag_cache/lock"
  flock -n 8 || {
    say "waiting for another run that uses $sag_cache"
    flock 8
  }
  rm -rf "$sag_cache"/*.partial
  export CCACHE_DIR=${CCACHE_DIR:-$sag_cache/ccache}
}

sag_close_cache() { exec 8>&-; }

sag_clean_up() {
  [[ -z $sag_child ]] || { kill "$sag_child" && wait "$sag_child"; } 2>/dev/null || true
  [[ -z $sag_partial ]] || rm -rf "$sag_partial"
}

# sag_make_environment <name> <what, for people> <pip arguments>...: leaves it in $sag_partial, to be kept or thrown away.
sag_make_environment() {
  local name=$1 what=$2
  shift 2
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$what comes from PyPI and needs Python 3.10 or newer; this is $(python3 --version)"
  # A name of its own: what a killed run left running must not write into this one.
  sag_partial=$(mktemp -d "$sag_cache/$name.XXXXXX.partial") || die "cannot make a folder in $sag_cache"
  chmod 755 "$sag_partial"
  "${sag_python:-python3}" -m venv "$sag_partial" >/dev/null || die "python3 -m venv failed in $sag_cache"
  mkdir "$sag_partial/tmp"
  local quiet=(-q)
  [[ -t 1 ]] && quiet=()
  # In the background, so that a signal stops this script at once and not when pip has finished.
  TMPDIR=$sag_partial/tmp PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$sag_partial/bin/python" -m pip install --no-cache-dir --retries 2 "${quiet[@]}" "$@" 8>&- &
  sag_child=$!
  wait "$sag_child" || {
    sag_child=
    die "pip could not install $what from PyPI (its messages are above); nothing was kept"
  }
  sag_child=
  rm -rf "$sag_partial/tmp"
}

sag_keep_environment() {
  mv "$sag_partial" "$sag_cache/$1" || die "cannot rename $sag_partial"
  sag_partial=
}

sag_site_packages() { echo "$1"/lib/python3.*/site-packages; }

sag_check_disk() {
  local free_gib
  free_gib=$(($(df -Pk "$sag_cache" | awk 'NR == 2 {print $4}') / 1024 / 1024))
  ((free_gib >= sag_needed_gib)) ||
    die "LibTorch needs $sag_needed_gib GiB of free disk while it installs, $sag_cache has $free_gib; free some, or name another disk in SAG_CACHE_DIR"
}

# --- CMake ------------------------------------------------------------------------------------------------------------

sag_find_cmake() {
  local version
  version=$(cmake --version | awk 'NR == 1 {print $3}')
  if ! printf '%s\n' "$sag_cmake_minimum" "$version" | sort -C -V; then
    local name=cmake-$sag_cmake_version
    if [[ ! -d $sag_cache/$name ]]; then
      say "this CMake is $version, sag needs $sag_cmake_minimum: downloading $sag_cmake_version"
      sag_make_environment "$name" "CMake $sag_cmake_version" "cmake==$sag_cmake_version"
      sag_keep_environment "$name"
    fi
    # The programs themselves: the scripts in bin/ name the folder that the environment was made in.
    PATH=$(sag_site_packages "$sag_cache/$name")/cmake/data/bin:$PATH
    export PATH
    version=$sag_cmake_version
  fi
  sag_cmake=$(command -v cmake)
  sag_ctest=$(command -v ctest)
  say "CMake $version: $sag_cmake"
}

# --- LibTorch ---------------------------------------------------------------------------------------------------------

sag_find_torch() {
  sag_torch_dir=''
  sag_own_torch=''
  sag_find_own_torch
  if [[ -z $sag_torch_dir ]]; then
    local name=torch-$sag_torch_version
    if [[ ! -d $sag_cache/$name ]]; then
      sag_check_disk
      say "downloading LibTorch $sag_torch_version (about 2.5 GB) into $sag_cache"
      sag_make_environment "$name" "torch $sag_torch_version" "torch==$sag_torch_version"
      sag_keep_environment "$name"
    fi
    sag_torch_dir=$(sag_site_packages "$sag_cache/$name")/torch/share/cmake/Torch
  fi
  say "LibTorch: $sag_torch_dir"
  sag_configure_args+=("-DTorch_DIR=$sag_torch_dir")
}

sag_find_own_torch() {
  local prefix prefixes
  if [[ -n ${Torch_DIR:-} ]]; then
    [[ -e $Torch_DIR/TorchConfig.cmake ]] || die "Torch_DIR is $Torch_DIR, and there is no TorchConfig.cmake in it"
    sag_torch_dir=$Torch_DIR sag_own_torch=1
    return
  fi
  IFS=':;' read -ra prefixes <<<"${CMAKE_PREFIX_PATH:-}"
  for prefix in "${prefixes[@]}"; do
    for sag_torch_dir in "$prefix/Torch" "$prefix/share/cmake/Torch"; do
      [[ ! -e $sag_torch_dir/TorchConfig.cmake ]] || { sag_own_torch=1 && return; }
    done
  done
  sag_torch_dir=
}

# --- The CUDA compiler ------------------------------------------------------------------------------------------------
# A LibTorch that was built with CUDA cannot be found without one, not even on a machine without a GPU.

sag_find_nvcc() {
  [[ -e $sag_torch_dir/../../../lib/libtorch_cuda.so ]] || return 0
  local nvcc toolkit=
  for nvcc in "${CUDACXX:-}" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    [[ -n $nvcc ]] && nvcc=$(command -v "$nvcc") && nvcc=$(readlink -f "$nvcc") || continue
    if sag_nvcc_fits "$nvcc"; then
      toolkit=$(dirname "$(dirname "$nvcc")")
      break
    fi
  done
  if [[ -z $toolkit ]]; then
    [[ -z $sag_own_torch ]] ||
      die "the LibTorch in $sag_torch_dir was built with CUDA: put the nvcc of its CUDA version on the PATH, or name it in CUDACXX"
    sag_make_toolkit
    toolkit=$sag_cache/cuda-$sag_cuda_version/toolkit
  fi
  say "CUDA compiler: $toolkit/bin/nvcc"
  export CUDACXX=$toolkit/bin/nvcc CUDA_HOME=$toolkit CUDA_PATH=$toolkit CUDAToolkit_ROOT=$toolkit
  sag_configure_args+=("-DCMAKE_CUDA_COMPILER=$CUDACXX" "-DCUDA_TOOLKIT_ROOT_DIR=$toolkit" "-DCUDAToolkit_ROOT=$toolkit")
}

# The downloaded LibTorch needs its own major version; a user's own we cannot know, so any will be tried.
sag_nvcc_fits() {
  [[ -x $1 && -e $(dirname "$1")/../include/cuda_runtime.h ]] || return 1
  [[ -n $sag_own_torch ]] || "$1" --version 2>/dev/null | grep -q "release ${sag_cuda_version%%.*}\."
}

# A toolkit out of PyPI's compiler packages, completed with what torch's own packages bring: runtime and headers.
sag_make_toolkit() {
  local name=cuda-$sag_cuda_version
  [[ ! -d $sag_cache/$name ]] || return 0
  say "no CUDA ${sag_cuda_version%%.*} compiler on this machine: downloading one (about 100 MB)"
  sag_make_environment "$name" "the CUDA compiler" --no-deps \
    "nvidia-cuda-nvcc==$sag_cuda_version.*" "nvidia-cuda-crt==$sag_cuda_version.*" \
    "nvidia-nvvm==$sag_cuda_version.*" "nvidia-cuda-cccl==$sag_cuda_version.*"
  local toolkit=$sag_partial/toolkit runtime library
  mv "$(sag_site_packages "$sag_partial")/nvidia/cu13" "$toolkit"
  runtime=$(sag_site_packages "$sag_cache/torch-$sag_torch_version")/nvidia/cu13
  cp -rsf "$runtime/include" "$runtime/lib" "$toolkit/"
  # The packages bring the versioned names only, and a linker looks for the plain ones.
  for library in "$toolkit"/lib/lib*.so.*; do
    library=$(basename "$library")
    ln -sf "$library" "$toolkit/lib/${library%%.so.*}.so"
  done
  ln -s lib "$toolkit/lib64"
  [[ -x $toolkit/bin/nvcc && -e $toolkit/include/cuda_runtime.h && -e $toolkit/lib/libcudart.so ]] ||
    die "the CUDA compiler packages do not hold what was expected; nothing was kept"
  sag_keep_environment "$name"
}

# --- What the exporter, the tools and their tests need ----------------------------------------------------------------
# For test.sh and bench.sh, which run exporter/ and tools/ with the Python that LibTorch was installed for: sag_python,
# with sag_python_path on its path. A LibTorch without a Python is tested without them.

sag_find_tools() {
  local requirements=$sag_root/tools/requirements.txt name
  sag_python=${sag_torch_dir%/lib/python3*}/bin/python3
  "$sag_python" -c 'import torch' 2>/dev/null || { sag_python=''; return 0; }
  name=tools-$({ cat "$requirements" "$sag_root/exporter/requirements.txt" && "$sag_python" --version; } | sha256sum | cut -c 1-12)
  if [[ ! -d $sag_cache/$name ]]; then
    say "downloading what the exporter and the tools need (about 100 MB)"
    sag_make_environment "$name" "what the exporter and the tools need" -r "$requirements"
    sag_keep_environment "$name"
  fi
  say "Python for the exporter and the tools: $sag_python"
  sag_python_path=$(sag_site_packages "$sag_cache/$name")
  sag_configure_args+=("-DSAG_PYTHON=$sag_python" "-DSAG_PYTHONPATH=$sag_python_path")
}

# --- Building ---------------------------------------------------------------------------------------------------------

# One job a core, and 2 GiB a job: a file that includes LibTorch's headers takes more than 1.
sag_jobs() {
  if [[ -n ${CMAKE_BUILD_PARALLEL_LEVEL:-} ]]; then
    echo "$CMAKE_BUILD_PARALLEL_LEVEL"
    return
  fi
  local cores memory
  cores=$(nproc)
  memory=$(awk '/^MemTotal/ {print int($2 / 2097152)}' /proc/meminfo)
  ((memory >= 1)) || memory=1
  echo $((cores < memory ? cores : memory))
}

sag_build() {
  CMAKE_BUILD_PARALLEL_LEVEL=$(sag_jobs)
  export CMAKE_BUILD_PARALLEL_LEVEL
  mkdir -p "$sag_build_dir"
  # Held until the script ends.
  exec 9>"$sag_build_dir/.sag-lock"
  flock -n 9 || {
    say "waiting for another run that builds in $sag_build_dir"
    flock 9
  }
  local stamp=$sag_build_dir/.sag-configured toolchain
  sag_configure_args+=("-DSAG_WARNINGS_AS_ERRORS=${SAG_WARNINGS_AS_ERRORS:-OFF}")
  toolchain=$(printf '%s\n' "$sag_cmake" "${sag_configure_args[@]}")
  if [[ ! -e $sag_build_dir/build.ninja || $(cat "$stamp" 2>/dev/null) != "$toolchain" ]]; then
    say "configuring $sag_build_dir"
    rm -f "$stamp"
    (cd "$sag_root" && "$sag_cmake" --preset release --fresh "${sag_configure_args[@]}") ||
      die "configuring failed; CMake's messages are above"
    printf '%s\n' "$toolchain" >"$stamp"
  fi
  say "building with $CMAKE_BUILD_PARALLEL_LEVEL job(s)"
  local targets=()
  (($# == 0)) || targets=(--target "$@")
  "$sag_cmake" --build "$sag_build_dir" "${targets[@]}" || die "the build failed; the compiler's messages are above"
}
