//! Random lives of a disk against a model: a vector, and the requests in the order in which they were made.

use std::collections::VecDeque;

use proptest::prelude::*;

use devices::Device;

use crate::driver::Request;
use crate::driver::Rig;
use crate::store::Done;
use crate::store::Step;
use crate::store::Store;

const SECTORS: u64 = 24;

#[derive(Clone, Debug)]
enum Act {
    Make(Request),
    Notify,
    /// The next call to the disk does this.
    Step(Step),
    Take,
    Acknowledge,
    /// Pause, save, load into a new device, resume.
    Update,
    /// Pause, save, load into a new device that is dropped, and resume: the update goes back.
    GoBack,
    Pause,
    Resume,
}

fn request() -> impl Strategy<Value = Request> {
    let write = (0..SECTORS + 2, 1usize..4, any::<u8>())
        .prop_map(|(sector, sectors, byte)| Request::Write { sector, bytes: vec![byte; sectors * 512] });
    prop_oneof![
        4 => write,
        3 => (0..SECTORS + 2, 1u64..4).prop_map(|(sector, sectors)| Request::Read { sector, sectors }),
        1 => Just(Request::Flush),
        1 => Just(Request::Id),
        1 => Just(Request::Unknown),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let step = prop_oneof![
        Just(Step::Whole),
        (1usize..600).prop_map(Step::Short),
        Just(Step::Interrupted),
        Just(Step::Fail),
        Just(Step::Zero),
    ];
    prop_oneof![
        6 => request().prop_map(Act::Make),
        3 => Just(Act::Notify),
        2 => step.prop_map(Act::Step),
        3 => Just(Act::Take),
        1 => Just(Act::Acknowledge),
        2 => Just(Act::Update),
        1 => Just(Act::GoBack),
        1 => Just(Act::Pause),
        1 => Just(Act::Resume),
    ]
}

/// What the disk holds and answers, if each request is done once, in order, with these results of the calls.
struct Model {
    bytes: Vec<u8>,
    steps: VecDeque<Step>,
    done: Vec<Done>,
}

impl Model {
    /// A transfer of `len` bytes from `offset` on: whether it was whole. `act` is told of each part that was done.
    fn transfer(
        &mut self,
        offset: u64,
        len: usize,
        mut act: impl FnMut(&mut Self, u64, usize, usize),
    ) -> bool {
        let mut at = 0;
        while at < len {
            let part = match self.steps.pop_front().unwrap_or(Step::Whole) {
                Step::Whole => len - at,
                Step::Short(most) => most.min(len - at),
                Step::Interrupted => continue,
                Step::Fail | Step::Zero => return false,
            };
            act(self, offset + u64::try_from(at).unwrap(), at, part);
            at += part;
        }
        true
    }

    fn sync(&mut self) -> bool {
        match self.steps.pop_front() {
            Some(Step::Interrupted) => self.sync(),
            Some(Step::Fail) => false,
            // The store takes these for "nothing done", without an error.
            Some(Step::Zero) => true,
            _ => {
                self.done.push(Done::Sync);
                true
            }
        }
    }

    /// Does a request: its status, and the data if that is certain.
    fn act(&mut self, request: &Request) -> (u8, Option<Vec<u8>>) {
        let fits = |sector: u64, sectors: u64| sector + sectors <= SECTORS;
        let (good, data) = match request {
            Request::Unknown => return (2, None),
            Request::Id => {
                let mut id = b"serial".to_vec();
                id.resize(20, 0);
                (true, Some(id))
            }
            Request::Flush => (self.sync(), None),
            Request::Read { sector, sectors } if fits(*sector, *sectors) => {
                let mut data = Vec::new();
                let len = usize::try_from(sectors * 512).unwrap();
                let good = self.transfer(sector * 512, len, |model, offset, _, len| {
                    let from = usize::try_from(offset).unwrap();
                    data.extend_from_slice(&model.bytes[from..from + len]);
                    model.done.push(Done::Read { offset, len });
                });
                (good, good.then_some(data))
            }
            Request::Write { sector, bytes } if fits(*sector, u64::try_from(bytes.len() / 512).unwrap()) => {
                let good = self.transfer(sector * 512, bytes.len(), |model, offset, at, len| {
                    let to = usize::try_from(offset).unwrap();
                    let part = &bytes[at..at + len];
                    model.bytes[to..to + len].copy_from_slice(part);
                    model.done.push(Done::Write { offset, bytes: part.to_vec() });
                });
                (good, None)
            }
            Request::Read { .. } | Request::Write { .. } => (false, None),
        };
        (u8::from(!good), data)
    }
}

/// The rig, the requests that wait for their answers, and the steps in the order in which they were given.
struct Life {
    rig: Rig,
    waiting: VecDeque<Request>,
    model: Model,
    paused: bool,
}

impl Life {
    fn new() -> Self {
        let sectors = usize::try_from(SECTORS).unwrap();
        let model = Model { bytes: vec![0; sectors * 512], steps: VecDeque::new(), done: Vec::new() };
        let rig = Rig::ready(Store::new(sectors));
        Self { rig, waiting: VecDeque::new(), model, paused: false }
    }

    fn check_next(&mut self) {
        let Some(request) = self.waiting.front().cloned() else { return };
        if let Some(answer) = self.rig.take(&request) {
            self.waiting.pop_front();
            self.check(&request, &answer);
        }
    }

    fn check(&mut self, request: &Request, answer: &crate::driver::Answer) {
        let (status, data) = self.model.act(request);
        assert_eq!(answer.status, status, "{request:?}");
        if let Some(data) = data {
            assert_eq!(answer.data, data, "{request:?}");
        }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Make(request) if self.rig.has_room() => {
                self.rig.make(request);
                self.waiting.push_back(request.clone());
            }
            Act::Make(_) | Act::Step(_) => {}
            Act::Notify => self.rig.notify(),
            Act::Take => self.check_next(),
            Act::Acknowledge => drop(self.rig.acknowledge()),
            Act::Update => {
                self.rig.update();
                self.paused = false;
            }
            Act::GoBack => {
                self.rig.blk.pause();
                let state = self.rig.blk.save().unwrap();
                let (successor, _line) = crate::driver::device(&self.rig.store, &self.rig.memory);
                successor.load(&state).unwrap();
                drop(successor);
                self.rig.blk.resume().unwrap();
                self.paused = false;
            }
            Act::Pause => {
                self.rig.blk.pause();
                self.paused = true;
            }
            Act::Resume => {
                self.rig.blk.resume().unwrap();
                self.paused = false;
            }
        }
    }

    fn finish(mut self) {
        if self.paused {
            self.rig.blk.resume().unwrap();
        }
        self.rig.notify();
        while let Some(request) = self.waiting.pop_front() {
            let answer = self.rig.await_answer(&request);
            self.check(&request, &answer);
        }
        self.rig.blk.pause();
        assert_eq!(self.rig.answered(), 0, "no request is answered twice");
        assert_eq!(self.rig.store.done(), self.model.done, "each is done once, in order");
        assert_eq!(self.rig.store.bytes(), self.model.bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn every_life_of_a_disk_does_each_request_once_and_in_order(
        acts in proptest::collection::vec(act(), 0..60),
    ) {
        let mut life = Life::new();
        // What the calls do is decided before any is made, so that it does not matter when the device makes them.
        let steps: Vec<Step> = acts
            .iter()
            .filter_map(|act| if let Act::Step(step) = act { Some(*step) } else { None })
            .collect();
        life.rig.store.script(steps.clone());
        life.model.steps = steps.into();
        for act in &acts {
            life.act(act);
        }
        life.finish();
    }
}
