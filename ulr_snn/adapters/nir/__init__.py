"""Exchange of trained models as graphs of the Neuromorphic Intermediate Representation (NIR).

NIR states equations in continuous time. Its readers integrate them in time steps of length dt, with a = dt / tau:

    LI        v += a (r I - v)
    LIF       v += a (r I - v);  s = v > threshold;  v = 0 where s
    CubaLIF   i += a_syn (w_in I - i), then as LIF with the current i

A neuron u = beta u + I is written with a = 1 - beta. NIR resets a membrane v to a value, never by subtraction. A reset
by subtraction, or none, is a CubaLIF that leaks in its current and not in its membrane (a = 1). Then the reset of v
clears nothing, and a connection from the spikes to the current subtracts the threshold, at the next step as `LIF` does.

The importers of snnTorch 1.0 and Norse 1.1 decide on the form, since both must read a file alike:
- Norse ignores r of a LIF, which therefore is 1. snnTorch takes r and w_in of a CubaLIF as 1 / a and 1 / a_syn only.
- snnTorch fails on a recurrent CubaLIF whose connection is a single Linear. A Flatten without effect follows it.
- Both apply Flatten to batches. Axes counted from the end are the same with and without an axis of samples.
- Norse knows no AvgPool2d. A SumPool2d stands in its place, and the weights behind it are divided.
"""
