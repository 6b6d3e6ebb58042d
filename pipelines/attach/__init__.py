"""Meeting a pipeline: what diffusers does with guidance, found out, verified and taken over.

A prediction's way, from the network to the scheduler, in the order to read it:

    intercept, deferred     a call of the pipeline, of its networks and of its scheduler is caught
    attach                  the pipeline's call becomes a run; `pair`, `arguments` and `turn` serve it
    run                     which of its networks and schedulers is called, and what for
    call, parts, clock      what the pipeline says of itself; its networks and schedulers; where in its table a step is
    denoiser                a network's call: what is evaluated of it
      batch                 which rows the plan wants, and what stands in for the others
      calls                 what a step has asked of it so far
      ahead                 a network that works ahead of it, such as a ControlNet
      together              several networks that make a step's predictions, followed as one
      cut, rows             a part of a batch on its own: taken from a call, and tried; `remembered` for later calls
      output, trees         the prediction in what a network puts out; what it puts out and what it takes, as trees
      told                  which branch a call is for, by its arguments
      beside                what a network gives beside its prediction: a video's sound
      processors            its attention processors: perturbed ones, and what its pipeline reads off them
      state, memory, foreign    whether what others have put on the network remembers anything from call to call
    host                    a step: what the scheduler is handed in place of the pipeline's prediction
    kind                    whether the step is guided, has one prediction alone, or is left to the pipeline
    discovery               how the step's outputs became the scheduler's prediction, found once
    verification            and held against each step
      layout                which outputs are which branch, and which part of one the scheduler gets
      combination           how two branches become one
      terms                 what more than two add
      formula               a layout, a combination and terms: all that is found out
      identify              the search for one, over each `reading` of the outputs, decided on a `sample` of numbers:
                            `solve` finds a scale without a name, `branching` what terms weigh, `residual` the rounding
      single                where there is one prediction and no guidance
    guidance/engine.py      the rule combines, the policy fills in, forecasts and plans the next step
    fused                   guidance and the scheduler's step in one
    again                   further steps of a scheduler on the same evaluation
    closing                 what the report of the run says beside its steps

Beside that way: `company` refuses what was not seen in full, `schedulers` reads `Space`s off a diffusers scheduler and
`solver` off its steps, `fingerprint` says what a calibration was made for, and `guider` meets loops that ask a guider
of diffusers instead: where it is used (`loop`), around another (`inner`), and as JSON (`config`).
"""
