//! Event loops, sockets, persistence, metrics: the layer that hardly ever changes.
//!
//! | room | one line |
//! | --- | --- |
//! | `config` | command line |
//! | `record`, `journal`, `recover` | what is written, how it becomes durable, how it is read back |
//! | `metrics`, `http` | counters, and the port that shows them |
//! | `shared` | what all threads reach |
//! | `connection`, `worker`, `trading` | one epoll loop per worker; sessions belong to one worker each |
//! | `gateway` | start, signals, orderly end |

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

pub use config::{Acknowledge, Config};
pub use gateway::{run, StartError};
pub use worker::now_ms;
