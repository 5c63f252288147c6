//! The manifest of format 1, read into today's.

use serde::Deserialize;

use super::manifest::{BuildRef, Function, HexBytes, Manifest, OldFunction, StateVersion, Static, Status};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestV1 {
    format: u32,
    name: String,
    builder: String,
    target: BuildRef,
    new: BuildRef,
    functions: Vec<FunctionV1>,
    statics: Vec<StaticV1>,
    types: String,
    may_unwind: bool,
    allowances: Vec<String>,
    hooks: [(); 0],
    states: Vec<StateVersion>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionV1 {
    name: String,
    demangled: String,
    status: Status,
    reason: String,
    new_at: u64,
    new_size: u64,
    source: Option<String>,
    old: Option<OldFunction>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StaticV1 {
    name: String,
    file: Option<String>,
    at: u64,
    size: u64,
}

/// Reads a manifest of format 1. No writer of that format wrote hooks, so a list that is not empty is an error.
pub(super) fn read(json: &[u8]) -> Result<Manifest, serde_json::Error> {
    let v1: ManifestV1 = serde_json::from_slice(json)?;
    let [] = v1.hooks;
    let function = |f: FunctionV1| Function {
        // Not recorded: so it may be.
        address_taken: true,
        name: f.name,
        demangled: f.demangled,
        status: f.status,
        reason: f.reason,
        new_at: f.new_at,
        new_size: f.new_size,
        source: f.source,
        old: f.old,
    };
    let lasting =
        |s: StaticV1| Static { name: s.name, file: s.file, at: s.at, size: s.size, type_digest: None::<HexBytes> };
    Ok(Manifest {
        format: v1.format,
        name: v1.name,
        builder: v1.builder,
        target: v1.target,
        new: v1.new,
        functions: v1.functions.into_iter().map(function).collect(),
        statics: v1.statics.into_iter().map(lasting).collect(),
        types: v1.types,
        may_unwind: v1.may_unwind,
        allowances: v1.allowances,
        states: v1.states,
        ..Manifest::default()
    })
}
