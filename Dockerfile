# docker build -t awp-engine .                                  for NVIDIA GPUs: CUDA code for sm_80, sm_90a and sm_100
# docker build -t awp-engine --build-arg BASE=ubuntu:24.04 \
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     for CPUs alone
# docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/workspace/runs" awp-engine awp train
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv

ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN pip install --no-cache-dir 'setuptools>=77' wheel \
    && pip install --no-cache-dir torch==${TORCH} --index-url ${TORCH_INDEX}

COPY . /src
RUN pip install --no-cache-dir --no-build-isolation '/src[train,eval,timm]' torch==${TORCH} \
    --extra-index-url ${TORCH_INDEX} \
    && rm -rf /src && python -m awp_kernels

WORKDIR /workspace
CMD ["awp"]
