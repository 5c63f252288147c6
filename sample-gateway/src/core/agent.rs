//! The agent: by it the gateway is patched from inside, with no thread held, and takes back what does harm.

use clap::Args;
use livepatch::agent::breaker::Bounds;
use livepatch::agent::StartError;
use livepatch::Agent;
use std::path::PathBuf;
use std::time::Duration;

/// What the agent may allocate before it takes from the gateway's heap.
const ARENA_BYTES: usize = 64 << 20;

/// The command line's part about the agent.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Agent")]
pub struct AgentConfig {
    /// Starts the agent, which listens on this socket; commands find it if it is named livepatch*.sock
    #[arg(long = "agent", value_name = "SOCKET")]
    pub socket: Option<PathBuf>,

    /// Patches must be signed by one of these keys: a public key of minisign, or a folder of *.pub files
    #[arg(long = "agent-keys", value_name = "PATH", requires = "socket")]
    pub keys: Option<PathBuf>,

    /// A line for each change is appended to this file
    #[arg(long = "agent-audit", value_name = "FILE", requires = "socket")]
    pub audit: Option<PathBuf>,

    /// After so many panics in patched code the patch is reverted
    #[arg(long = "agent-max-panics", value_name = "N", requires = "socket", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_panics: Option<u64>,

    /// The patch is reverted if a larger share of orders and cancels is refused or fails, 0 to 1
    #[arg(long = "agent-max-error-rate", value_name = "RATE", requires = "socket", value_parser = share)]
    pub max_error_rate: Option<f64>,

    /// A canary by session is reverted if its new arm fails, panics or is late so many times as much as the old one
    #[arg(long = "agent-max-than-old", value_name = "TIMES", requires = "socket", value_parser = times)]
    pub max_than_old: Option<f64>,

    /// The patch is reverted if the handling of more than one message in a hundred takes longer
    #[arg(long = "agent-max-p99-us", value_name = "MICROSECONDS", requires = "socket", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_p99_us: Option<u64>,
}

impl AgentConfig {
    /// Starts it, if there is to be one. To be called before there are threads that a patch may concern.
    ///
    /// # Errors
    /// Those of the agent.
    pub fn start(&self) -> Result<Option<Agent>, StartError> {
        let Some(socket) = &self.socket else { return Ok(None) };
        let bounds = Bounds {
            panics: self.max_panics,
            error_rate: self.max_error_rate,
            p99: self.max_p99_us.map(Duration::from_micros),
            than_old: self.max_than_old,
            ..Bounds::default()
        };
        let mut builder = Agent::builder().socket(socket).arena(ARENA_BYTES).bounds(bounds);
        if let Some(keys) = &self.keys {
            builder = builder.keys(keys);
        }
        if let Some(audit) = &self.audit {
            builder = builder.audit(audit);
        }
        builder.start().map(Some)
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err("from 0 to 1".to_owned())
    }
}

fn times(text: &str) -> Result<f64, String> {
    let times: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if times.is_finite() && times >= 1.0 {
        Ok(times)
    } else {
        Err("at least 1".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use crate::core::Config;
    use clap::Parser;

    #[test]
    fn bounds_need_an_agent_and_make_sense() {
        let parse = |more: &[&str]| Config::try_parse_from(["gateway"].iter().chain(more));
        assert!(parse(&["--agent-max-panics", "3"]).is_err());
        let agent = ["--agent", "livepatch.sock"];
        assert!(parse(&[&agent[..], &["--agent-max-panics", "0"]].concat()).is_err());
        assert!(parse(&[&agent[..], &["--agent-max-error-rate", "5"]].concat()).is_err());
        assert!(parse(&[&agent[..], &["--agent-max-than-old", "0.5"]].concat()).is_err());
        let config = parse(&[&agent[..], &["--agent-max-error-rate", "0.05"]].concat()).unwrap().agent;
        assert_eq!((config.max_error_rate, config.max_panics), (Some(0.05), None));
        assert!(parse(&[]).unwrap().agent.start().unwrap().is_none(), "without the option there is none");
    }
}
