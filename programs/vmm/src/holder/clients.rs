//! Who comes to a machine that is held.

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use tracing::debug;
use tracing::warn;

use super::AGAIN;
use super::LOOK;
use crate::control;
use crate::control::Request;

/// Connections that a holder has at a time.
const MAX_CLIENTS: usize = 64;

/// Who asks for something, of those who have come or come now; `None` if nobody can come here any more.
pub(super) fn next(listener: &Listener, clients: &mut Vec<Channel>) -> Option<(Channel, Request)> {
    loop {
        let fds: Vec<_> = clients.iter().map(AsFd::as_fd).chain([listener.as_fd()]).collect();
        let place = match fdpass::ready(&fds, Deadline::never()) {
            Ok(ready) => ready.first().copied()?,
            Err(error) => {
                warn!(%error, "cannot wait for who comes");
                thread::sleep(AGAIN);
                return None;
            }
        };
        if place == clients.len() {
            accept(listener, clients);
            continue;
        }
        let channel = clients.remove(place);
        match control::receive(&channel, Deadline::after(Duration::ZERO)) {
            Ok(Some(request)) => return Some((channel, request)),
            other => debug!(?other, "somebody asks for nothing any more"),
        }
    }
}

fn accept(listener: &Listener, clients: &mut Vec<Channel>) {
    match listener.accept(Deadline::after(Duration::ZERO)) {
        Ok(channel) if channel.require_same_user().is_ok() => {
            // Whoever has been silent for longest makes room.
            clients.drain(..clients.len().saturating_sub(MAX_CLIENTS - 1));
            clients.push(channel);
        }
        Ok(_) => {}
        Err(error) => {
            debug!(%error, "somebody did not stay");
            thread::sleep(LOOK);
        }
    }
}
