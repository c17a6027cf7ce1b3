# The tests:            docker build --target test -t conv_ops:test . && docker run --rm conv_ops:test
# The package, CPU:     docker build -t conv_ops .          && docker run --rm conv_ops
# The package, CUDA:    docker build --build-arg CUDA=1 --build-arg TORCH_INDEX= -t conv_ops:cuda .
#                       docker run --rm --gpus all conv_ops:cuda
# No step needs a GPU: nvcc comes from PyPI, what to build is decided by CUDA alone.

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake g++ make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home user \
 && install --directory --owner=user /home/user/conv_ops
USER user
WORKDIR /home/user/conv_ops
ARG CUDA=0
# Where builds of PyTorch without CUDA lie; PyPI's own is several gigabytes larger.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV CUDA=${CUDA} PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1
# The tools have a layer of their own: they change less often than the sources.
COPY --chown=user Makefile requirements-dev.txt requirements-cuda.txt ./
RUN make tools
COPY --chown=user . .

FROM build AS test
RUN make build
CMD ["make", "test"]

FROM build AS wheel
RUN make wheel SMOKE=/home/user/env

# Only the environment that the wheel was installed and tried in.
FROM python:${PYTHON}
RUN useradd --create-home user
USER user
WORKDIR /home/user
COPY --from=wheel --chown=user /home/user/env env
ENV PATH=/home/user/env/bin:${PATH}
CMD ["python", "-m", "conv_ops"]
