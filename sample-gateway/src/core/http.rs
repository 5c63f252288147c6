//! The metrics port: HTTP/1.1, one request per connection, `GET /metrics` only.

use super::shared::Shared;
use livepatch::Agent;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Weak;
use std::time::Duration;

/// A client that is slower than this is cut off: one thread serves them all.
const PATIENCE: Duration = Duration::from_secs(2);
const LONGEST_REQUEST: usize = 8 * 1024;

/// Serves until the gateway stops.
pub fn serve(listener: &TcpListener, shared: &Weak<Shared>) {
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                let Some(shared) = shared.upgrade() else { return };
                // A scraper that goes away is no concern of the gateway's.
                drop(answer(stream, &shared));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn answer(mut stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let n = stream.read(&mut chunk)?;
        if n == 0 || request.len() + n > LONGEST_REQUEST {
            return Ok(());
        }
        request.extend_from_slice(&chunk[..n]);
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") {
        let mut text = shared.metrics.text(shared.books.resting());
        text.push_str(&shared.agent.as_ref().map(Agent::metrics).unwrap_or_default());
        ("200 OK", text)
    } else {
        ("404 Not Found", "only /metrics is here\n".to_owned())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}
