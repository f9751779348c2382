# halfbyte in a container:
#
#   docker build -t halfbyte .
#   docker run --rm --gpus all -v "$PWD:/data" -v "$HOME/.cache:/root/.cache" halfbyte doctor
#   docker run --rm --gpus all -v "$PWD:/data" -v "$HOME/.cache:/root/.cache" halfbyte \
#       train --model MODEL --data train.jsonl --output out
#
# --gpus needs NVIDIA's container toolkit; without a GPU leave it out. The image has CUDA's libraries
# from torch's wheel. `--build-arg TORCH=` builds one without, where the package index has a CPU build.
FROM debian:bookworm-slim

# g++ and Python's headers: kernels for a CPU, and Triton's launchers, are compiled when first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /srv/halfbyte
COPY Makefile constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
ARG TORCH=torch
RUN make TORCH="$TORCH" .venv/.halfbyte && rm -rf /root/.cache

ENV PATH="/srv/halfbyte/.venv/bin:$PATH"
WORKDIR /data
ENTRYPOINT ["halfbyte"]
CMD ["--help"]
