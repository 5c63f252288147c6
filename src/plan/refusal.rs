//! Refusals: not failures, but a no with its reason.

use crate::addr::ProcAddr;

/// Why a patch is not applied or reverted; nothing was changed. Waiting does not help against any of these.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The process runs another build.
    #[error("the process runs build {running} of {image}, the patch is for build {wanted} ({file})")]
    OtherBuild {
        /// The build-id of the process's executable, in hex.
        running: String,
        /// Its name.
        image: String,
        /// The build-id that the patch is for.
        wanted: String,
        /// The file that it was built from.
        file: String,
    },
    /// The process runs the new build already.
    #[error("the process runs build {running}, which is the build that the patch leads to: old and new were swapped, or the process has the fix already")]
    Swapped {
        /// The build-id of the process's executable, in hex.
        running: String,
    },
    /// The executable has no build-id.
    #[error("{image} has no GNU build-id in memory, so it cannot be told from other builds")]
    NoBuildId {
        /// Its name.
        image: String,
    },
    /// The patch is for a library that the process has not loaded.
    #[error("the process has not loaded {file}, which the patch is for (build {wanted})")]
    NotLoaded {
        /// The build-id that the patch is for.
        wanted: String,
        /// The file that it was built from.
        file: String,
    },
    /// The image is several times in the process.
    #[error("{image} is mapped {count} times in this process")]
    MappedTwice {
        /// Its name.
        image: String,
        /// How often.
        count: usize,
    },
    /// Not an x86-64 program.
    #[error("{image} is not an x86-64 program")]
    OtherArchitecture {
        /// Its name.
        image: String,
    },
    /// The process is confined by seccomp.
    #[error("the process is confined by seccomp (mode {mode})")]
    Seccomp {
        /// The mode in /proc/PID/status.
        mode: u32,
    },
    /// The process has a shadow stack.
    #[error("the process runs with a shadow stack (x86_Thread_features: shstk)")]
    ShadowStack,
    /// Another process shares the memory.
    #[error("process {pid} shares the memory of this one (vfork or clone with CLONE_VM)")]
    SharedMemory {
        /// The other process.
        pid: i32,
    },
    /// The process switches stacks by itself.
    #[error("{image} uses {symbol}: stacks that no thread stands on cannot be checked")]
    Contexts {
        /// The image.
        image: String,
        /// The function that switches stacks.
        symbol: String,
    },
    /// Code is not what it was built as.
    #[error("{} {at}: {function}", if *breakpoint { "a breakpoint (int3) stands at" } else { "code was changed by something else at" })]
    CodeChanged {
        /// The function.
        function: String,
        /// Its address in the process.
        at: ProcAddr,
        /// Whether its first byte is `int3`.
        breakpoint: bool,
    },
    /// The entry jump would lie in two pages, which the kernel writes one after the other.
    #[error("the first bytes of {function} at {at} lie in two pages, and a jump there can't be written in one step")]
    EntryAcrossPages {
        /// The function.
        function: String,
        /// Where the jump would begin.
        at: ProcAddr,
    },
    /// What follows a short function is in use.
    #[error("{function} at {at} is too short for the entry jump, and what follows it is no padding")]
    EntryTooShort {
        /// The function.
        function: String,
        /// Its address in the process.
        at: ProcAddr,
    },
    /// What the entry jump overwrites cannot be moved, which the switch of several functions needs.
    #[error("{function}: {why}, which a switch of several functions at once needs")]
    EntryImmovable {
        /// The function.
        function: String,
        /// Why.
        why: String,
    },
    /// The function branches to where the entry jump goes.
    #[error("{function}: the instruction at {from} refers to {to}, inside its own entry jump")]
    BranchIntoEntry {
        /// The function.
        function: String,
        /// The instruction.
        from: ProcAddr,
        /// Where it goes.
        to: ProcAddr,
    },
    /// A function holds what is no instruction.
    #[error("{function}: the bytes at {at} are no x86-64 instruction")]
    Undecodable {
        /// The function.
        function: String,
        /// Where.
        at: ProcAddr,
    },
    /// No room near the image.
    #[error("no room for {len_bytes} bytes within 2 GiB of the image")]
    NoRoom {
        /// How much was needed.
        len_bytes: u64,
    },
    /// A reference does not reach its target.
    #[error("a reference at {at} does not reach {to}")]
    OutOfReach {
        /// From.
        at: ProcAddr,
        /// To.
        to: ProcAddr,
    },
    /// Old and new code may not run side by side.
    #[error("only the whole stack will do (--consistency stack): {why}")]
    Beside {
        /// Why not.
        why: String,
    },
    /// Another patch is applied.
    #[error("patch {applied} is applied")]
    OtherPatch {
        /// Its name.
        applied: String,
    },
    /// The patch takes the place of one that is not applied.
    #[error("the patch takes the place of {wanted}, and what is applied is {}", applied.as_deref().unwrap_or("nothing"))]
    After {
        /// The patch that it wants applied, with the digest of its file.
        wanted: String,
        /// The newest that is, likewise.
        applied: Option<String>,
    },
    /// The patch to revert is not the newest.
    #[error("patch {name} is not the newest: {newest} was applied after it")]
    NotNewest {
        /// The patch that was asked for.
        name: String,
        /// The newest.
        newest: String,
    },
    /// A patch's record or code in the process is damaged.
    #[error("patch {name} at {at} is not as it was written: {what}")]
    Damaged {
        /// The patch.
        name: String,
        /// Where.
        at: ProcAddr,
        /// What is wrong.
        what: String,
    },
    /// An interrupted command left something half-way.
    #[error("a command that was interrupted left patch {name} half-way")]
    Unfinished {
        /// The patch.
        name: String,
    },
    /// Unwind tables are needed and cannot be registered.
    #[error("a panic or exception may cross the patch, and the process offers no __register_frame")]
    NoUnwinder,
    /// Something that the patch imports cannot be found.
    #[error("the patch imports what cannot be bound: {what}")]
    Import {
        /// What, and why.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// The patch's own hook says no.
    #[error("the hook {symbol} says no: {said}")]
    Hook {
        /// Its symbol.
        symbol: String,
        /// Its own words, or the number that it returned.
        said: String,
    },
    /// The patch can't be given to a share of the calls only.
    #[error("the patch can't be a canary: {why}")]
    Canary {
        /// Why.
        why: String,
    },
    /// States of the process and those that the patch knows don't fit, or can't be migrated so.
    #[error("{why}")]
    State {
        /// Why.
        why: String,
    },
    /// The process has seen a patch of a higher revision.
    #[error("the patch is signed as {}, and the process has seen revision {seen}", revision.map_or_else(|| "of no revision".to_owned(), |r| format!("revision {r}")))]
    Replay {
        /// Its own, if the signature gives one.
        revision: Option<u64>,
        /// The highest that the process has seen.
        seen: u64,
    },
    /// A reverted patch can't be taken out of memory.
    #[error("no memory is taken back: of patch {patch}, {what}")]
    InUse {
        /// Its name, or that of one of several.
        patch: String,
        /// What leads to it, or may.
        what: String,
    },
    /// The patch asks for something that this version cannot do.
    #[error("the patch needs {what}, which this version cannot do from outside")]
    Unsupported {
        /// What.
        what: String,
    },
    /// The kernel refuses the memory.
    #[error("the kernel refuses executable memory in this process: {error}")]
    NoExecutableMemory {
        /// Its error.
        error: String,
    },
}

impl Refusal {
    /// A stable name for programs.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::OtherBuild { .. } => "build-id-mismatch",
            Self::Swapped { .. } => "swapped-builds",
            Self::NoBuildId { .. } => "no-build-id",
            Self::NotLoaded { .. } => "not-loaded",
            Self::MappedTwice { .. } => "mapped-twice",
            Self::OtherArchitecture { .. } => "other-architecture",
            Self::Seccomp { .. } => "seccomp",
            Self::ShadowStack => "shadow-stack",
            Self::SharedMemory { .. } => "shared-memory",
            Self::Contexts { .. } => "contexts",
            Self::CodeChanged { breakpoint: true, .. } => "breakpoint",
            Self::CodeChanged { .. } => "code-changed",
            Self::EntryAcrossPages { .. } => "entry-across-pages",
            Self::EntryTooShort { .. } => "entry-too-short",
            Self::EntryImmovable { .. } => "entry-immovable",
            Self::BranchIntoEntry { .. } => "branch-into-entry",
            Self::Undecodable { .. } => "undecodable",
            Self::NoRoom { .. } => "no-room",
            Self::OutOfReach { .. } => "out-of-reach",
            Self::Beside { .. } => "beside",
            Self::OtherPatch { .. } => "other-patch",
            Self::After { .. } => "after",
            Self::Unfinished { .. } => "unfinished",
            Self::NotNewest { .. } => "not-newest",
            Self::Damaged { .. } => "damaged",
            Self::NoUnwinder => "no-unwinder",
            Self::Import { .. } => "import",
            Self::Hook { .. } => "hook",
            Self::Canary { .. } => "canary",
            Self::State { .. } => "state",
            Self::Replay { .. } => "replay",
            Self::InUse { .. } => "in-use",
            Self::Unsupported { .. } => "unsupported",
            Self::NoExecutableMemory { .. } => "no-executable-memory",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::OtherBuild { .. } => "build the patch from the build that this process runs".into(),
            Self::Swapped { .. } => "give patch-builder the running build first and the fixed one second".into(),
            Self::NoBuildId { .. } => "link with -Wl,--build-id".into(),
            Self::NotLoaded { .. } => "apply it again once the process has loaded the library (dlopen)".into(),
            Self::MappedTwice { .. } => "load it once: all of its mappings would have to change together".into(),
            Self::OtherArchitecture { .. } => "only 64-bit x86 programs can be patched".into(),
            Self::Seccomp { .. } => "run livepatch with CAP_SYS_ADMIN (as root): then it can look at the filter, and suspend it for the thread that maps the patch".into(),
            Self::ShadowStack => "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off".into(),
            Self::SharedMemory { .. } => "try again when that process has called exec or ended".into(),
            Self::Contexts { .. } => {
                "if none of its suspended contexts can be inside a patched function, --allow contexts".into()
            }
            Self::CodeChanged { breakpoint: true, .. } => "remove the breakpoint or probe".into(),
            Self::CodeChanged { .. } => {
                "take back what changed it (another patcher, a hook), or restart the process".into()
            }
            Self::EntryAcrossPages { .. } => {
                "align functions (-falign-functions=16), or patch its callers instead".into()
            }
            Self::EntryTooShort { .. }
            | Self::EntryImmovable { .. }
            | Self::BranchIntoEntry { .. }
            | Self::Undecodable { .. } => "patch its callers instead".into(),
            Self::NoRoom { .. } | Self::OutOfReach { .. } => "restart the process, or make the patch smaller".into(),
            Self::Beside { .. } => "apply it with --consistency stack, the default".into(),
            Self::OtherPatch { applied } => {
                format!("build the patch with --after and the file of {applied}, or revert that first (livepatch revert PID {applied})")
            }
            Self::Unfinished { .. } => "finish or undo it: livepatch recover PID".into(),
            Self::After { .. } => "apply that patch first, or build one for what is applied (--after)".into(),
            Self::NotNewest { newest, .. } => format!("revert {newest} first, or use --all"),
            Self::Damaged { .. } => "something else wrote there; restart the process".into(),
            Self::NoUnwinder => "link the program dynamically with libgcc_s (the default of gcc and rustc); if no thread of it is cancelled and nothing throws through the patch, --allow unwind".into(),
            Self::Import { remedy, .. } => remedy.clone(),
            Self::Hook { .. } => "mend what it names, or ask whoever wrote the hook".into(),
            Self::Canary { .. } => "give each function of the patch its key (--key FUNC:argN), or apply it to all calls".into(),
            Self::State { .. } => "build the patch from the versions that the process has, and apply it to all through the agent that is linked in".into(),
            Self::Replay { .. } => "apply the newest patch; if it is meant to go back, --allow replay".into(),
            Self::InUse { .. } => "it does no harm where it is; try again later, or leave it".into(),
            Self::Unsupported { .. } => "build the patch without it".into(),
            Self::NoExecutableMemory { .. } => "relax the policy (SELinux execmem, seccomp) for this process".into(),
        }
    }
}
