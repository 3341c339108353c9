//! Compiles the protocol definitions under `proto/` with `protoc`.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().compile_protos(
        &[
            "proto/kuasar/v1/admin.proto",
            "proto/services/containers/v1/containers.proto",
            "proto/services/sandbox/v1/sandbox.proto",
            "proto/services/streaming/v1/streaming.proto",
            "proto/services/tasks/v1/tasks.proto",
            "proto/types/runtimeoptions/v1/api.proto",
            "proto/types/transfer/streaming.proto",
        ],
        &["proto"],
    )
}
