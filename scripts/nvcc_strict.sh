#!/bin/sh
# nvcc that also fails where ptxas had to serialise wgmma (C7510, C7511, C7514, C7517). ptxas calls
# that an "info", so `-Xptxas -Werror`, which stops spills, lets it pass at a fraction of the speed.
log=$("${CUDA_HOME:?}/bin/nvcc" "$@" 2>&1)
status=$?
[ -z "$log" ] || printf '%s\n' "$log" >&2
case $log in
  *"(C75"*)
    echo "nvcc_strict: ptxas gave up the asynchrony of wgmma (see above)" >&2
    exit 1
    ;;
esac
exit $status
