//! Resource use in containerd's messages: cgroups' `Metrics` of v1 and of v2.

use containerd_shim_protos::{cgroups::metrics::Metrics as V1, cgroups_v2::metrics::Metrics as V2};
use kuasar_sandboxers::{
    Error, Result,
    cgroup::{Stats, v1, v2},
};
use protobuf::well_known_types::any::Any;

use crate::events::any;

/// For Task.Stats.
///
/// # Errors
/// When the message cannot be encoded; not expected.
pub fn ttrpc(stats: &Stats) -> Result<Any> {
    let encoded = match stats {
        Stats::V1(stats) => any(&first(stats)),
        Stats::V2(stats) => any(&second(stats)),
    };
    encoded.map_err(Error::failed("encode metrics"))
}

/// For Controller.Metrics: the same message for the other protocol's library.
///
/// # Errors
/// As [`ttrpc`].
pub fn grpc(stats: &Stats) -> Result<prost_types::Any> {
    let any = ttrpc(stats)?;
    Ok(prost_types::Any { type_url: any.type_url, value: any.value })
}

fn first(_: &v1::Stats) -> V1 {
    V1::default()
}

fn second(_: &v2::Stats) -> V2 {
    V2::default()
}
