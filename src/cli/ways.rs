//! The two ways into a process: by the agent that is linked into it, where one listens, else from outside.

use std::path::Path;
use std::time::Duration;

use livepatch::agent::client::{find, ClientError};
use livepatch::agent::wire::{Answer, Failure, FailureKind, Given, Request, WireError};
use livepatch::patch::PatchFile;
use livepatch::patcher::{status_of, CheckReport, Error, Options, Patcher, ProcessStatus, Report};
use livepatch::process::{Pid, ProcessError};
use livepatch::signature;
use serde::Serialize;
use serde_json::{json, Value};

use super::text::SESSION;

/// How long an agent may take for what needs no waiting, and for all but the waiting.
const PROMPT: Duration = Duration::from_secs(5);

/// An agent that reverts all may wait for each patch; how many there are, only it knows.
const ALL: u32 = 10;

/// What a revert may wait for: a switch, and a hook before and after it.
const OF_REVERT: u32 = 3;

/// The longest text that is taken for a signature.
const MAX_SIGNATURE: u64 = 64 << 10;

/// A patch as it was read.
pub struct Fix {
    /// What it holds.
    pub patch: PatchFile,
    /// Its file.
    pub bytes: Vec<u8>,
    signature: Option<String>,
}

impl Fix {
    /// With the signature that lies beside the file, if one does.
    pub fn new(patch: PatchFile, bytes: Vec<u8>, path: &Path) -> Self {
        let file = signature::beside(path);
        let is_short = file.metadata().is_ok_and(|m| m.len() <= MAX_SIGNATURE);
        let signature = is_short.then(|| std::fs::read_to_string(&file).ok()).flatten();
        Self { patch, bytes, signature }
    }

    fn given(&self, options: &Options) -> Given {
        Given { options: options.clone(), signature: self.signature.clone() }
    }
}

/// What was found or done, and by whom.
#[derive(Serialize)]
pub struct Done<T> {
    /// What.
    #[serde(flatten)]
    pub what: T,
    /// `agent`, unless it was done from outside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<&'static str>,
}

impl<T> Done<T> {
    fn by_agent(what: T) -> Self {
        Self { what, by: Some("agent") }
    }

    fn from_outside(what: T) -> Self {
        Self { what, by: None }
    }

    /// Whether the agent did it, and goes on looking after it.
    pub fn is_by_agent(&self) -> bool {
        self.by.is_some()
    }
}

/// Why it was not done.
pub enum Failed {
    /// From outside.
    Engine(Error),
    /// The agent said so.
    Agent(Failure),
    /// The agent could not be asked, or did not answer.
    Unanswered(ClientError),
    /// What only an agent can do, without one.
    NoAgent,
}

impl From<Error> for Failed {
    fn from(e: Error) -> Self {
        Self::Engine(e)
    }
}

const NO_AGENT: &str = "--key session needs an agent that is linked into the process";
const NO_AGENT_REMEDY: &str = "give --key FUNC:argN";

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Engine(e) => e.fmt(f),
            Self::Agent(failure) => f.write_str(&failure.message),
            // One that is at work may have half of an apply behind it: nobody is told to go past it.
            Self::Unanswered(e @ (ClientError::Unreachable { .. } | ClientError::Another { .. })) => {
                write!(f, "{e}; --hold goes in from outside")
            }
            Self::Unanswered(e) => e.fmt(f),
            Self::NoAgent => write!(f, "refused: {NO_AGENT}: {NO_AGENT_REMEDY}"),
        }
    }
}

impl Failed {
    /// The exit code of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Engine(e) => e.exit_code(),
            Self::Agent(failure) => failure.exit,
            Self::Unanswered(_) => 1,
            Self::NoAgent => 3,
        }
    }

    /// What is printed of it for programs.
    pub fn to_json(&self, pid: Option<i32>) -> Value {
        match self {
            Self::Engine(e) => e.to_json(pid),
            Self::Agent(failure) => failure.json.clone(),
            Self::Unanswered(_) => {
                json!({"pid": pid, "error": {"message": self.to_string(), "exit": self.exit_code()}})
            }
            Self::NoAgent => {
                json!({"pid": pid, "refusal": {"kind": "no-agent", "message": NO_AGENT, "remedy": NO_AGENT_REMEDY, "waiting_helps": false}})
            }
        }
    }

    /// Whether no patch is applied.
    pub fn is_nothing_applied(&self) -> bool {
        match self {
            Self::Engine(e) => matches!(e, Error::NothingApplied { .. }),
            Self::Agent(failure) => failure.kind == FailureKind::NothingApplied,
            _ => false,
        }
    }

    /// Whether there is no patch of that name.
    pub fn is_not_applied(&self) -> bool {
        let is_another = match self {
            Self::Engine(e) => matches!(e, Error::NoSuchPatch { .. }),
            Self::Agent(failure) => failure.kind == FailureKind::NoSuchPatch,
            _ => false,
        };
        is_another || self.is_nothing_applied()
    }

    /// Whether there is no such process any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Engine(Error::Process(ProcessError::Gone(_))))
    }
}

/// What the process's agent says; nothing where there is none, where `hold` is asked for, and where the agent asks for it.
fn ask(
    pid: i32,
    hold: bool,
    request: &Request,
    patch: Option<&[u8]>,
    within: Duration,
) -> Result<Option<Answer>, Failed> {
    let Some(agent) = (!hold).then(|| find(pid)).flatten() else { return Ok(None) };
    match agent.ask(request, patch, within).map_err(Failed::Unanswered)? {
        Answer::Failed(failure) => Err(Failed::Agent(failure)),
        Answer::Outside { why } => {
            eprintln!("livepatch: the agent of process {pid} asks for the hold from outside: {why}");
            Ok(None)
        }
        answer => Ok(Some(answer)),
    }
}

fn odd() -> Failed {
    Failed::Unanswered(WireError::Body("it answers another question".into()).into())
}

/// What no hold can do.
fn needs_agent(options: &Options) -> Result<(), Failed> {
    let by_session = options.canary.iter().flat_map(|c| &c.keys).any(|(f, n)| f == SESSION && *n == 0);
    if by_session {
        Err(Failed::NoAgent)
    } else {
        Ok(())
    }
}

/// Would it apply?
pub fn check(pid: i32, fix: &Fix, options: &Options, hold: bool) -> Result<Done<CheckReport>, Failed> {
    match ask(pid, hold, &Request::Check(fix.given(options)), Some(&fix.bytes), options.timeout.saturating_add(PROMPT))?
    {
        Some(Answer::Check(report)) => Ok(Done::by_agent(report)),
        Some(_) => Err(odd()),
        None => {
            needs_agent(options)?;
            Ok(Done::from_outside(Patcher::open(Pid(pid))?.check(&fix.patch, options)?))
        }
    }
}

/// Applies it. With `confirm_within`, an agent sees to that itself.
pub fn apply(pid: i32, fix: &Fix, options: &Options, hold: bool) -> Result<Done<Report>, Failed> {
    // Each hook may take as long as the switch.
    let waits = fix.patch.manifest.hooks.len() as u32 + 1;
    let within = options.timeout.saturating_mul(waits).saturating_add(PROMPT);
    match ask(pid, hold, &Request::Apply(fix.given(options)), Some(&fix.bytes), within)? {
        Some(Answer::Reports(mut reports)) if reports.len() == 1 => reports.pop().map(Done::by_agent).ok_or_else(odd),
        Some(_) => Err(odd()),
        None => {
            needs_agent(options)?;
            Ok(Done::from_outside(Patcher::open(Pid(pid))?.apply(&fix.patch, options)?))
        }
    }
}

/// Reverts the newest, or `name` if it is that, or all.
pub fn revert(
    pid: i32,
    name: Option<&str>,
    all: bool,
    options: &Options,
    hold: bool,
) -> Result<Vec<Done<Report>>, Failed> {
    let request = Request::Revert { name: name.map(Into::into), all, options: options.clone() };
    let within = options.timeout.saturating_mul(OF_REVERT * if all { ALL } else { 1 }).saturating_add(PROMPT);
    match ask(pid, hold, &request, None, within)? {
        Some(Answer::Reports(reports)) => Ok(reports.into_iter().map(Done::by_agent).collect()),
        Some(_) => Err(odd()),
        None => {
            let mut process = Patcher::open(Pid(pid))?;
            let reports = if all { process.revert_all(options)? } else { vec![process.revert(name, options)?] };
            Ok(reports.into_iter().map(Done::from_outside).collect())
        }
    }
}

/// Sets a canary's share, in 1/10,000.
pub fn set_share(pid: i32, name: &str, share: u32, hold: bool) -> Result<(), Failed> {
    match ask(pid, hold, &Request::Canary { name: name.into(), share }, None, PROMPT)? {
        Some(Answer::Done) => Ok(()),
        Some(_) => Err(odd()),
        None => Ok(Patcher::open(Pid(pid))?.set_share(name, share)?),
    }
}

/// Makes a patch permanent.
pub fn confirm(pid: i32, name: &str, hold: bool) -> Result<(), Failed> {
    match ask(pid, hold, &Request::Confirm { name: name.into() }, None, PROMPT)? {
        Some(Answer::Done) => Ok(()),
        Some(_) => Err(odd()),
        None => Ok(Patcher::open(Pid(pid))?.confirm(name)?),
    }
}

/// What is applied. That can be read from outside, whatever the agent is doing.
pub fn status(pid: i32) -> Result<Done<ProcessStatus>, Failed> {
    match ask(pid, false, &Request::Status, None, PROMPT) {
        Ok(Some(Answer::Status(status))) => return Ok(Done::by_agent(status)),
        Ok(None) => {}
        Ok(Some(_)) => eprintln!("livepatch: process {pid}: its agent answers another question; read from outside"),
        Err(Failed::Unanswered(e)) => eprintln!("livepatch: process {pid}: {e}; read from outside"),
        Err(e) => return Err(e),
    }
    Ok(Done::from_outside(status_of(Pid(pid))?))
}

/// What was read from outside.
pub fn outside<T>(found: Vec<T>) -> Vec<Done<T>> {
    found.into_iter().map(Done::from_outside).collect()
}
