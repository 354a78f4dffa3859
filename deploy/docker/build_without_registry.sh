#!/usr/bin/env bash
# Builds the images' targets where no container registry can be reached, and tries those of scheduler and demo-shard: the base image is
# made by debootstrap, everything else is the Dockerfile as it is. Needs root, and debootstrap, buildah, podman and runc (Debian's packages).
#
#   deploy/docker/build_without_registry.sh [scheduler] [shard] [demo-shard]
#
# BUILD_FLAGS are passed to buildah, such as "--volume /etc/pip.conf:/etc/pip.conf:ro" or "--build-arg TORCH_INDEX=...".
set -euo pipefail
cd "$(dirname "$0")/../.."
base=localhost/insitu-python:bookworm
limits=(--ulimit nofile=8192:8192 --ulimit nproc=4096:4096)
# As a pod runs it: no root, nothing to write to but volumes, no capabilities, no network.
pod=(podman run --runtime runc --rm --network none --read-only --tmpfs /data:rw,mode=1777 --tmpfs /tmp --cap-drop ALL
  --security-opt no-new-privileges "${limits[@]}" --entrypoint sh)

if ! podman image exists "$base"; then
  root=$(mktemp --directory)
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >&2
  ln --symbolic --force python3 "$root/usr/bin/python"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  tar --directory "$root" --create . | podman import - "$base"
fi

try_scheduler() {
  "${pod[@]}" --env INSITU_DATA_DIR=/data localhost/insitu/scheduler:0.1.0 -ec '
    python -c "
import importlib.util, os
assert os.getuid() == 10001
assert not importlib.util.find_spec(\"torch\")"
    python -m insitu_scheduler --metrics-port 9464 & scheduler=$!
    python -c "
import time, urllib.request
for _ in range(100):
    time.sleep(0.3)
    try:
        page = urllib.request.urlopen(\"http://127.0.0.1:9464/status\").read()
    except OSError:
        continue
    assert b\"Models\" in page
    break
else:
    raise SystemExit(\"the scheduler in the image does not serve\")"
    kill -TERM $scheduler
    wait $scheduler'
  echo 'the scheduler of the image serves, as user 10001, without torch, and ends when told'
}

try_demo_shard() {
  "${pod[@]}" localhost/insitu/demo-shard:0.1.0 -ec '
    python -m insitu_shard --model HuggingFaceTB/SmolLM2-135M-Instruct --port 7434 --health-port 7435 & shard=$!
    python -c "
import time, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(\"127.0.0.1:7435\"))
for _ in range(600):
    time.sleep(0.3)
    try:
        if stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
            break
    except grpc.RpcError:
        continue
else:
    raise SystemExit(\"the shard group in the image is not ready\")"
    kill -TERM $shard
    wait $shard'
  echo 'the shard group of the image loads its model, is ready, and ends when told'
}

for target in "${@:-scheduler}"; do
  # shellcheck disable=SC2086 # BUILD_FLAGS are several words
  buildah bud --runtime runc --network host --pull-never "${limits[@]}" ${BUILD_FLAGS:-} \
    --build-arg PYTHON_IMAGE="$base" --target "$target" --tag "localhost/insitu/$target:0.1.0" \
    --file deploy/docker/Dockerfile .
  case $target in
    scheduler) try_scheduler ;;
    demo-shard) try_demo_shard ;;
  esac
done
