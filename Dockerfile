# The cpu lane in a container: rehearses a run, tests the package. The neuron lane needs AWS's Neuron image.
#   docker build -t nxdt-nemo .        (about 9 GB: the registry's torch carries CUDA)
#   docker run --rm nxdt-nemo make demo
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/nxdt_nemo
COPY . .
RUN make setup
ENV PATH=/opt/nxdt_nemo/.venv/bin:$PATH OMP_NUM_THREADS=1
CMD ["nxdt-nemo", "--help"]
