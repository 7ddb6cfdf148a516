//! Bodies: the same data, end and trailers however they are cut; nothing is taken beyond the end.
#![no_main]

use arbitrary::Arbitrary;
use bytes::BytesMut;
use gateway::http1::{
    body::{Decoded, Decoder},
    head::{Framing, Refused},
};
use http::HeaderMap;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    length: Option<u16>,
    piece: u8,
    bytes: Vec<u8>,
}

type Read = Result<(Vec<u8>, Option<HeaderMap>, bool, usize), Refused>;

fn decode(framing: Framing, bytes: &[u8], piece: usize) -> Read {
    let mut decoder = Decoder::new(framing);
    let mut buffer = BytesMut::new();
    let (mut data, mut trailers, mut given) = (Vec::new(), None, 0);
    for piece in bytes.chunks(piece.max(1)) {
        if decoder.is_done() {
            break;
        }
        buffer.extend_from_slice(piece);
        given += piece.len();
        loop {
            match decoder.decode(&mut buffer)? {
                Decoded::Data(more) => {
                    assert!(!more.is_empty());
                    data.extend_from_slice(&more);
                }
                Decoded::Trailers(fields) => trailers = Some(fields),
                Decoded::End | Decoded::More => break,
            }
        }
    }
    Ok((data, trailers, decoder.is_done(), given - buffer.len()))
}

fuzz_target!(|input: Input| {
    let framing = input.length.map_or(Framing::Chunked, |length| Framing::Length(length.into()));
    let whole = decode(framing, &input.bytes, input.bytes.len());
    let pieces = decode(framing, &input.bytes, input.piece.into());
    match (&whole, &pieces) {
        // Consumed bytes may differ while a frame is not over; what came of them may not.
        (Ok((data, trailers, done, used)), Ok((data2, trailers2, done2, used2))) => {
            assert_eq!((data, trailers, done), (data2, trailers2, done2));
            assert!(!done || used == used2);
            if let (Framing::Length(length), true) = (framing, done) {
                assert_eq!(data.len() as u64, length);
            }
        }
        (Err(_), Err(_)) => {}
        (one, other) => panic!("{one:?} and {other:?}"),
    }
});
