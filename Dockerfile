# Two images. The last stage is the default: the cpu lane, to rehearse a run and to test the package.
#   docker build -t nxdt-nemo .                        (about 9 GB: the registry's torch carries CUDA)
#   docker run --rm nxdt-nemo make demo
# `trainium` is what the EKS job of `nxdt-nemo launch` runs (docs/trainium.md). It was not built by us yet: its packages are
# on AWS's repositories only.
#   docker build --target trainium -t nxdt-nemo:trainium .

FROM ubuntu:22.04 AS trainium
ARG NEURON_RUNTIME=2.31.24.0
ARG NEURON_COLLECTIVES=2.31.24.0
ARG TORCH_NEURONX=2.9.0.2.13.26312
ARG NEURONX_CC=2.24.8799.0
ARG LIBNEURONXLA=2.2.16408.0
ENV DEBIAN_FRONTEND=noninteractive
# Neuron's runtime and collectives: user space only, the host's kernel has the driver.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl g++ git gnupg make python3-pip \
    && curl -fsSL https://apt.repos.neuron.amazonaws.com/GPG-PUB-KEY-AMAZON-AWS-NEURON.PUB \
       | gpg --dearmor -o /usr/share/keyrings/neuron.gpg \
    && echo "deb [signed-by=/usr/share/keyrings/neuron.gpg] https://apt.repos.neuron.amazonaws.com jammy main" \
       > /etc/apt/sources.list.d/neuron.list \
    && apt-get update \
    && apt-get install --yes --no-install-recommends \
       "aws-neuronx-runtime-lib=${NEURON_RUNTIME}*" "aws-neuronx-collectives=${NEURON_COLLECTIVES}*" aws-neuronx-tools \
    && rm -rf /var/lib/apt/lists/*
# libfabric with EFA, without the kernel module.
RUN curl -fsSLO https://efa-installer.amazonaws.com/aws-efa-installer-latest.tar.gz \
    && tar -xf aws-efa-installer-latest.tar.gz \
    && (cd aws-efa-installer && apt-get update && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify) \
    && rm -rf aws-efa-installer* /var/lib/apt/lists/*
WORKDIR /opt/nxdt_nemo
COPY . .
RUN pip install --no-cache-dir uv \
    && uv python install 3.11 \
    && make setup PYTHON="$(uv python find 3.11)" \
    && uv pip install --python .venv/bin/python --compile-bytecode --index-strategy unsafe-best-match \
       --extra-index-url https://pip.repos.neuron.amazonaws.com --constraints requirements.lock \
       "torch-neuronx==${TORCH_NEURONX}" "neuronx-cc==${NEURONX_CC}" "libneuronxla==${LIBNEURONXLA}"
ENV PATH=/opt/nxdt_nemo/.venv/bin:/opt/aws/neuron/bin:/opt/amazon/efa/bin:$PATH \
    LD_LIBRARY_PATH=/opt/aws/neuron/lib:/opt/amazon/efa/lib
CMD ["nxdt-nemo", "doctor"]

FROM python:3.11-slim AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/nxdt_nemo
COPY . .
RUN make setup
ENV PATH=/opt/nxdt_nemo/.venv/bin:$PATH OMP_NUM_THREADS=1
CMD ["nxdt-nemo", "--help"]
