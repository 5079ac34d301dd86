// kernels/hopper.cuh for a CPU: nothing yet. device.cuh has what its names can be made of:
//
//     shim::wait(id, count)        barrier of `count` threads of the block; shim::arrive(id, count) does not wait
//     shim::await(what, ready)     until the function ready() says so, because of what other threads do; `what` is
//                                  named where nothing ever does (mbarrier phases)
//     shim::collective(&post)      instructions of a warp, see shim::Matrices and shim::multiply; of the four of a
//                                  warpgroup's product each has rows of its own, so that it is one of a warp, too
//     shim::publish()              where a thread releases what it wrote, as an arrival at an mbarrier does
//     shim::shared_place(...)      the pointer that shared_address made a number of
//     shim::cluster_wait()         barrier of the cluster; __cluster_dims__ is read by emulate.py
//     shim::block->rank            in the cluster; shim::peer(mine, rank): the same place in another block's memory
//     shim::fault(format, ...)     ends the launch with a message
//
// A kernel's parameter that is a struct of 64-bit words is launched with a tuple of tensors (whose address it gets) and
// whole numbers, zeros for the rest.
#pragma once
#include "device.cuh"
