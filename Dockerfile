# A chat or a server in a container: Python, the CPU build of torch, no compiler, no root.
#
#     docker build -t qwen2 .
#     docker run -it -v qwen2-models:/models qwen2 run
#     docker run -p 11434:11434 -v qwen2-models:/models -e QWEN2_API_KEY=... qwen2 serve --host 0.0.0.0
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
RUN python -m venv /opt/qwen2
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN /opt/qwen2/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt torch
COPY pyproject.toml CMakeLists.txt LICENSE README.md ./
COPY src ./src
RUN /opt/qwen2/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.12-slim
COPY --from=build /opt/qwen2 /opt/qwen2
RUN useradd --create-home --uid 1000 qwen2 && mkdir /models && chown qwen2:qwen2 /models
ENV PATH=/opt/qwen2/bin:$PATH QWEN2_HOME=/models PYTHONUNBUFFERED=1
USER qwen2
WORKDIR /home/qwen2
VOLUME /models
EXPOSE 11434
ENTRYPOINT ["qwen2"]
CMD ["--help"]
