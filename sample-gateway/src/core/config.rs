//! The command line.

use super::agent::AgentConfig;
use clap::{Parser, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;

/// A FIX 4.4 acceptor: orders in, execution reports out.
///
/// Example: sample-gateway --port 9880 --metrics-port 9881 --data /var/lib/gateway --workers 2
#[derive(Clone, Debug, Parser)]
#[command(name = "sample-gateway", version)]
pub struct Config {
    /// TCP port for FIX sessions; 0 takes a free one and prints it
    #[arg(long, default_value_t = 9880)]
    pub port: u16,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub bind: IpAddr,

    /// HTTP port for Prometheus metrics; none without it, 0 takes a free one
    #[arg(long)]
    pub metrics_port: Option<u16>,

    /// Folder for sequence numbers and the order journal
    #[arg(long, default_value = "gateway-data")]
    pub data: PathBuf,

    /// Worker threads, each with an event loop
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: u16,

    /// The gateway's own CompID
    #[arg(long, default_value = "GATEWAY")]
    pub comp_id: String,

    /// When an order is acknowledged
    #[arg(long, value_enum, default_value_t = Acknowledge::Durable)]
    pub acknowledge: Acknowledge,

    /// Mebibytes of sent messages kept in memory for ResendRequests, over all sessions
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub resend_memory: u32,

    /// Most symbols
    #[arg(long, default_value_t = 10_000)]
    pub max_symbols: usize,

    /// The agent, if there is to be one
    #[command(flatten)]
    pub agent: AgentConfig,
}

/// When an order is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Acknowledge {
    /// When its record is on disk (fsync): an acknowledged order survives a crash of process, kernel or power
    Durable,
    /// When its record is handed to the journal: a crash of the process loses the orders of the last milliseconds
    Received,
}
