//! Event loops, sockets, persistence, metrics: the layer that hardly ever changes.
//!
//! | room | one line |
//! | --- | --- |
//! | `config` | command line |
//! | `agent` | the agent by which the gateway is patched from inside, and takes back what does harm |
//! | `record`, `journal`, `recover` | what is written, how it becomes durable, how it is read back |
//! | `metrics`, `http` | counters, and the port that shows them |
//! | `shared` | what all threads reach |
//! | `connection`, `worker`, `trading` | one epoll loop per worker; sessions belong to one worker each |
//! | `gateway` | start, signals, orderly end |

mod agent;
mod config;
mod connection;
mod gateway;
mod guard;
mod http;
mod journal;
mod metrics;
mod record;
mod recover;
mod replies;
mod shared;
mod trading;
mod worker;

pub use agent::AgentConfig;
pub use config::{Acknowledge, Config};
pub use gateway::{run, StartError};
pub use worker::now_ms;
