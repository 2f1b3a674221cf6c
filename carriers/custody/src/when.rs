//! Moments that are told of across a kexec.

use liveupdate::moment::Moment;
use serde::Deserialize;
use serde::Serialize;

/// When what happened: [`Moment`]s, each with a word, in the order in which they were noted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct When {
    list: Vec<Noted>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    what: String,
    boot: [u8; 16],
    tsc: u64,
    monotonic_ns: u64,
    realtime_ns: u64,
    spread_ns: u64,
}

impl When {
    /// Notes that this happens now. Where the kernel does not tell the time, it is not noted.
    pub fn now(&mut self, what: &str) {
        if let Ok(now) = Moment::now() {
            self.note(what, &now);
        }
    }

    /// Notes when this happened.
    pub fn note(&mut self, what: &str, at: &Moment) {
        let Moment { boot, tsc, monotonic_ns, realtime_ns, spread_ns } = *at;
        self.list.push(Noted { what: what.to_owned(), boot, tsc, monotonic_ns, realtime_ns, spread_ns });
    }

    /// When this happened first.
    pub fn at(&self, what: &str) -> Option<Moment> {
        let noted = self.list.iter().find(|noted| noted.what == what)?;
        let Noted { boot, tsc, monotonic_ns, realtime_ns, spread_ns, .. } = *noted;
        Some(Moment { boot, tsc, monotonic_ns, realtime_ns, spread_ns })
    }

    /// Takes in what another has noted.
    pub fn extend(&mut self, other: &Self) {
        self.list.extend(other.list.iter().cloned());
    }
}
