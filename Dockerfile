# Two images: `build` compiles checkpoints and needs no GPU; `run` runs bundles on an RTX GPU, without PyTorch.
#
#   docker build --target build -t cosmos-export:build .
#   docker run --rm -v $PWD:/data cosmos-export:build build /data/checkpoint -o /data/x.bundle --target rtx-pro-6000
#   docker build --target run -t cosmos-export:run .
#   docker run --rm --gpus all -v $PWD:/data cosmos-export:run run /data/x.bundle -p "A robot folds a towel." -o /data/x.mp4

FROM python:3.11-slim AS base
WORKDIR /src
COPY . .
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS build
RUN pip install "torch==2.13.0" && pip install ".[compile,calibrate,rtx]" -c constraints.txt && rm -rf /src
WORKDIR /data
ENTRYPOINT ["cosmos-export"]

FROM base AS run
RUN pip install ".[run,rtx]" -c constraints.txt && rm -rf /src
WORKDIR /data
ENTRYPOINT ["cosmos-export"]
