//! What a successor hears from who says that it is the predecessor, over a real socket.

use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
use machine::update::Step;
use socket::Successor;
use socket::SuccessorError;
use socket::Timeouts;

/// Messages, with a byte of zero between them: the offer, and what comes after it. No descriptor comes.
pub(crate) fn offer(input: &[u8]) -> bool {
    let Ok((own, peer)) = Channel::pair() else { return false };
    let now = Deadline::after(Duration::ZERO);
    for message in input.split(|byte| *byte == 0) {
        // One that is too long is not sent.
        let _ = peer.send(message, &[], now);
    }
    let timeouts = Timeouts { prepare: Duration::ZERO, hand_over: Duration::ZERO };
    match Successor::greet(own, &["a-format"], timeouts) {
        Ok(successor) => {
            let _ = successor.attach(&mut |_: Step| ());
            true
        }
        // What is said of the other side's words is what a user gets to see.
        Err(error) => {
            let shown = error.to_string();
            assert!(!shown.contains(char::is_control), "{shown:?} is not escaped");
            matches!(error, SuccessorError::Formats { .. } | SuccessorError::TooManyFds { .. })
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let offer = |formats: &str, regions: &str, descriptors: u64, more: &str| {
        format!(
            r#"{{"message":"offer","protocol":1,"identity":"07","formats":[{formats}],"regions":[{regions}],"descriptors":{descriptors},"vmm":{{"a":[1,null]}}{more}}}"#
        )
    };
    let own = r#""a-format","tideover-gmem-v1","luo-v5""#;
    let texts = [
        offer(own, "8388608,1073741824", 0, ""),
        offer("", "", 0, r#","origin":"made_again""#),
        offer("\"\\u001b[2J\"", "1", 1, ""),
        offer(own, "1", 1_000_000, ""),
        offer(own, "1", 0, "") + "\0" + r#"{"message":"memory"}"#,
    ];
    texts.map(String::into_bytes).to_vec()
}
